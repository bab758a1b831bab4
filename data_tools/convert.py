"""Convert shards to and from Megatron-LM's .bin and .idx files. Tokens and documents stay the same.

  python -m data_tools.convert --to megatron SHARDS --out PREFIX                   writes PREFIX_train.bin, .idx (and PREFIX_val)
  python -m data_tools.convert --from megatron PREFIX --out DIR --tokenizer FILE   reads PREFIX, or PREFIX_train and PREFIX_val

The Megatron-LM files contain only token ids. Give the tokenizer that made them with --tokenizer (byte, a tokenizer.json, or a
folder that contains one).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.cut import ADVICE, RawWriter, Stream, cut_shard, plan_shards
from data_tools.megatron import PIECE_TOKENS, MegatronReader, MegatronWriter
from mpidp.data.index import Index, SplitRecord
from mpidp.data.shards import TokenStream
from mpidp.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, token_dtype
from mpidp.errors import DataError, UsageError
from mpidp.runtime.command import Parser, run_entry
from mpidp.runtime.files import write_file, writing
from mpidp.runtime.log import counted
from mpidp.runtime.options import add_new_out, program, take_out


def to_megatron(shards: Path, prefix: Path) -> list[str]:
    """Write every split as PREFIX_SPLIT.bin and .idx; return a line of text about each split.

    If the end of training cuts a document in two, the rest becomes the first document of validation. Raises UsageError if a file
    exists or cannot be written, and DataError if the shards are damaged or have a loss mask. Independent.
    """
    streams = [TokenStream(shards, split) for split in TokenStream(shards).index.splits]
    if any(stream.has_loss_mask for stream in streams):
        raise DataError(f"{shards} has a loss mask, which .bin and .idx cannot store: the masked tokens would be trained on")
    lines = []
    for stream in streams:
        with writing(f"{prefix}_{stream.split}.bin", "choose another prefix"):
            prefix.parent.mkdir(parents=True, exist_ok=True)
        writer = MegatronWriter(Path(f"{prefix}_{stream.split}"), stream.vocab_size)
        try:
            for at in range(0, stream.num_tokens, PIECE_TOKENS):
                ids = stream.read(at, min(PIECE_TOKENS, stream.num_tokens - at))
                stream.check_ids(at, ids)
                writer.add(ids)
            bases = np.cumsum([0, *(record.tokens for record in stream.files)])
            found = [stream.doc_offsets(i).astype(np.int64) + bases[i] for i in range(len(stream.files))]
            starts = np.unique(np.concatenate([np.zeros(1, np.int64), *found]))
            writer.close(starts, stream.num_tokens)
        except BaseException:
            writer.abandon()
            raise
        lines.append(f"{prefix}_{stream.split}: {counted(stream.num_tokens, 'token')}, {counted(len(starts), 'document')}")
    return lines


def from_megatron(prefix: Path, out: Path, tokenizer: str, shards: int, val_fraction: float, eod: str | None) -> list[str]:
    """Write shards from Megatron-LM files; return a line of text about each split.

    Reads PREFIX, whose last val_fraction becomes validation, or PREFIX_train and PREFIX_val. Skips documents without tokens.
    Raises UsageError if an argument is invalid or `out` exists, and DataError if the files are damaged or do not match the
    tokenizer. Independent.
    """
    if out.exists():
        raise UsageError(f"{out} exists and is not overwritten: choose another folder, or remove it yourself")
    if shards < 1 or not 0 <= val_fraction < 1:
        raise UsageError(f"--shards {shards} must be at least 1, and --val-fraction {val_fraction} in [0, 1)")
    sources = {"train": MegatronReader(prefix)} if Path(f"{prefix}.idx").exists() else {
        split: MegatronReader(Path(f"{prefix}_{split}")) for split in ("train", "val")
        if split == "train" or Path(f"{prefix}_{split}.idx").exists()
    }
    encoder = ByteTokenizer() if tokenizer == "byte" else load_tokenizer(tokenizer, eod)
    with writing(out, "choose another folder"):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}."))
    try:
        (scratch / "new").mkdir()
        skipped, streams = 0, {}
        for split, source in sources.items():
            writer = RawWriter(scratch, split, token_dtype(encoder.vocab_size))
            for number, ids in enumerate(source.documents()):
                skipped += not len(ids)
                if len(ids):
                    _check(ids, encoder, source, number)
                    writer.end_document_with(ids)
            streams[split] = Stream([writer.close()])
        index = _write(streams, encoder, scratch / "new", shards, val_fraction, prefix)
        with writing(out, ADVICE):
            os.rename(scratch / "new", out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    lines = [f"{out}: {split} {record.tokens:,} tokens, {record.documents:,} documents" for split, record in index.splits.items()]
    if other := sum(source.not_text for source in sources.values()):
        lines.append(f"{counted(other, 'sequence')} with a mode other than 0 (multimodal data) {'was' if other == 1 else 'were'} "
                     "read as text")
    return lines + [f"{counted(skipped, 'document')} without tokens {'was' if skipped == 1 else 'were'} skipped"] * (skipped > 0)


def _check(ids: np.ndarray, encoder: Tokenizer, source: MegatronReader, number: int) -> None:
    if ids.min() < 0 or ids.max() >= encoder.vocab_size:
        bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise DataError(
            f"{source.path}: document {number} contains the id {bad}, but the tokenizer's ids are 0..{encoder.vocab_size - 1}: "
            "give the tokenizer that the data were made with, --tokenizer FILE"
        )


def _write(streams: dict[str, Stream], encoder: Tokenizer, out: Path, shards: int, val_fraction: float, prefix: Path) -> Index:
    stored = encoder.to_json()
    sha256 = hashlib.sha256(stored.encode()).hexdigest()
    share = val_fraction if "val" not in streams else 0.5  # the size has no effect if there is a split val
    plans = plan_shards(streams, shards, share)
    files = [cut_shard(plan, streams[plan.stream], out, encoder, sha256)[0] for plan in plans]
    splits = {}
    for split in dict.fromkeys(plan.split for plan in plans):
        of_split = [f for f in files if f.split == split]
        tokens, documents, text = (sum(getattr(f, key) for f in of_split) for key in ("tokens", "documents", "text_bytes"))
        splits[split] = SplitRecord(tokens, documents, text, loss_mask=False)
    index = Index(encoder.vocab_size, encoder.eod, encoder.kind, sha256, splits, files, {"kind": "megatron", "path": str(prefix)})
    with writing(out, ADVICE):
        write_file(out / "tokenizer.json", stored)
        write_file(out / "index.json", index.to_json())
    return index


def main() -> None:
    """Command-line entry point. Independent."""
    options = read_options(sys.argv[1:])
    if options.to:
        lines = to_megatron(options.input, Path(options.out))
    else:
        lines = from_megatron(
            options.input, Path(options.out), options.tokenizer, options.shards, options.val_fraction, options.eod
        )
    print("\n".join(lines))


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the command line. Raises UsageError if it is invalid. Pure."""
    parser = Parser(prog=program("data_tools.convert"), description=__doc__,
                    usage="%(prog)s (--to megatron SHARDS | --from megatron PREFIX --tokenizer FILE) --out PATH [options]",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=("megatron",), help="write the shards in this format")
    direction.add_argument("--from", choices=("megatron",), dest="source", help="read this format and write shards")
    add("input", metavar="SHARDS|PREFIX", type=Path, help="what to read: a folder of shards, or a Megatron-LM prefix")
    add_new_out(parser, "what to write: a prefix with --to, a folder that does not exist with --from", metavar="PATH")
    add("--tokenizer", metavar="PATH", help="with --from: byte, a tokenizer.json, or a folder that contains one")
    add("--eod", help="with --from: the end-of-document token of the tokenizer.json, if it has an unusual name")
    add("--shards", type=int, metavar="N", default=4, help="with --from: number of training files (%(default)s)")
    add("--val-fraction", type=float, metavar="F", default=0.05,
        help="with --from and a single PREFIX: this fraction at its end becomes validation; 0: none (%(default)s)")
    options = parser.parse_intermixed_args(list(arguments))
    take_out(parser, options, "a second path", "--out PATH")
    if options.source and not options.tokenizer:
        parser.error("--from megatron needs --tokenizer: the files hold token ids only")
    return options


if __name__ == "__main__":
    run_entry(main)

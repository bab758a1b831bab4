"""Shards from and to Megatron-LM's .bin and .idx: the same tokens and documents.

  python -m data_tools.convert --to megatron SHARDS PREFIX                     PREFIX_train.bin, .idx; PREFIX_val where there is
  python -m data_tools.convert --from megatron PREFIX OUT --tokenizer FILE     of PREFIX, or of PREFIX_train and PREFIX_val

Ids are ids: the tokenizer that gave them is told with --tokenizer (byte, a tokenizer.json, or a folder with one).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from data_tools.cut import RawWriter, Stream, cut_shard, plan_shards
from data_tools.megatron import PIECE_TOKENS, Reader, Writer
from mpidp.data.index import Index, SplitRecord
from mpidp.data.shards import TokenStream
from mpidp.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, token_dtype
from mpidp.errors import DataError, UsageError
from mpidp.runtime.command import Parser, run_entry
from mpidp.runtime.files import write_atomically


def to_megatron(shards: Path, prefix: Path) -> list[str]:
    """Every split as PREFIX_SPLIT.bin and .idx; what is said of each. The rest of a document that was cut by the end of training
    is the first document of validation. UsageError, DataError. Independent."""
    streams = [TokenStream(shards, split) for split in TokenStream(shards).index.splits]
    if any(stream.has_loss_mask for stream in streams):
        raise DataError(f"{shards} has a loss mask, and .bin and .idx have no place for one: what is not to be learned would be")
    said = []
    for stream in streams:
        try:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            writer = Writer(Path(f"{prefix}_{stream.split}"), stream.vocab_size)
        except OSError as error:
            raise UsageError(f"cannot write {prefix}_{stream.split}.bin: {error.strerror}; choose another prefix") from None
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
        said.append(f"{prefix}_{stream.split}: {stream.num_tokens:,} tokens, {len(starts):,} documents")
    return said


def from_megatron(prefix: Path, out: Path, tokenizer: str, shards: int, val_fraction: float, eod: str | None) -> list[str]:
    """Shards of PREFIX, whose end is validation by val_fraction, or of PREFIX_train and PREFIX_val; what is said of each split.
    Documents without a token are left out. UsageError, DataError. Independent."""
    if out.exists():
        raise UsageError(f"{out} exists, and nothing is overwritten: choose another folder, or remove it yourself")
    if shards < 1 or not 0 <= val_fraction < 1:
        raise UsageError(f"--shards {shards} must be at least 1, and --val-fraction {val_fraction} in [0, 1)")
    sources = {"train": Reader(prefix)} if Path(f"{prefix}.idx").exists() else {
        split: Reader(Path(f"{prefix}_{split}")) for split in ("train", "val")
        if split == "train" or Path(f"{prefix}_{split}.idx").exists()
    }
    encoder = ByteTokenizer() if tokenizer == "byte" else load_tokenizer(tokenizer, eod)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}; choose another folder") from None
    try:
        (scratch / "new").mkdir()
        left_out, streams = 0, {}
        for split, source in sources.items():
            writer = RawWriter(scratch, split, token_dtype(encoder.vocab_size))
            for number, ids in enumerate(source.documents()):
                left_out += not len(ids)
                if len(ids):
                    _check(ids, encoder, source, number)
                    writer.end_document_with(ids)
            streams[split] = Stream([writer.close()])
        index = _write(streams, encoder, scratch / "new", shards, val_fraction, prefix)
        os.rename(scratch / "new", out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    said = [f"{out}: {split} {of.tokens:,} tokens, {of.documents:,} documents" for split, of in index.splits.items()]
    return said + [f"{left_out:,} documents without a token were left out"] * (left_out > 0)


def _check(ids: np.ndarray, encoder: Tokenizer, source: Reader, number: int) -> None:
    if ids.min() < 0 or ids.max() >= encoder.vocab_size:
        bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise DataError(
            f"{source.path}: document {number} has the id {bad}, and the tokenizer's are 0..{encoder.vocab_size - 1}: give the "
            "one that the data were made with, --tokenizer FILE"
        )


def _write(streams: dict[str, Stream], encoder: Tokenizer, out: Path, shards: int, val_fraction: float, prefix: Path) -> Index:
    stored = encoder.to_json()
    sha256 = hashlib.sha256(stored.encode()).hexdigest()
    share = val_fraction if "val" not in streams else 0.5  # anything but none: validation is there
    plans = plan_shards(streams, shards, share)
    files = [cut_shard(plan, streams[plan.stream], out, encoder, sha256)[0] for plan in plans]
    splits = {}
    for split in dict.fromkeys(plan.split for plan in plans):
        of_split = [f for f in files if f.split == split]
        tokens, documents, text = (sum(getattr(f, key) for f in of_split) for key in ("tokens", "documents", "text_bytes"))
        splits[split] = SplitRecord(tokens, documents, text, loss_mask=False)
    index = Index(encoder.vocab_size, encoder.eod, encoder.kind, sha256, splits, files, {"kind": "megatron", "path": str(prefix)})
    write_atomically(out / "tokenizer.json", stored)
    write_atomically(out / "index.json", index.to_json())
    return index


def main() -> None:
    """The command line. Independent."""
    parser = Parser(prog="python -m data_tools.convert", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=("megatron",))
    way.add_argument("--from", choices=("megatron",), dest="source")
    add("what", metavar="SHARDS|PREFIX", type=Path, help="what is read")
    add("out", metavar="PREFIX|OUT", type=Path, help="what is made; it must not exist")
    add("--tokenizer", help="from: byte, a tokenizer.json, or a folder with one")
    add("--eod", help="from: the end-of-document token of a given tokenizer.json, when it has no usual name")
    add("--shards", type=int, default=4, help="from: training files (%(default)s)")
    add("--val-fraction", type=float, default=0.05, help="from a single PREFIX: its end is validation; 0: none (%(default)s)")
    options = parser.parse_args()
    if options.source and not options.tokenizer:
        parser.error("--from megatron needs --tokenizer: its files hold ids, and nothing of what they mean")
    if options.to:
        said = to_megatron(options.what, options.out)
    else:
        said = from_megatron(
            options.what, options.out, options.tokenizer, options.shards, options.val_fraction, options.eod
        )
    print("\n".join(said))


if __name__ == "__main__":
    run_entry(main)

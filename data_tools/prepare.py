"""Text to shards: `[mpirun -np N] python -m data_tools.prepare --source DIR --tokenizer bpe:8192 --out shards/mine`.

The same bytes for any number of ranks. Each rank encodes a run of whole files (about equal in bytes) into raw temporary
files in OUT, which together are the token stream; then each rank cuts some of the shards from these. Memory does not
grow with the corpus. The old shards of OUT stay whole until the new ones are.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.counts import Counts
from data_tools.cut import Raw, RawWriter, ShardPlan, Stream, cut_shard, plan_shards
from data_tools.sources import Reader, SourceFile, find_files
from data_tools.team import Team
from data_tools.vocabulary import check_tokenizer, make_tokenizer
from mpidp.data.index import (
    FileRecord,
    Index,
    SplitRecord,
    read_index,
    write_atomically,
)
from mpidp.data.tokenizer import Tokenizer, token_dtype
from mpidp.entry import Parser, begin, run_entry
from mpidp.errors import DataError, UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

BATCH_CHARACTERS = 2**20  # encoded at once
SCRATCH = ".prepare"  # the temporary folder in OUT


def prepare(
    source: str = "stdlib", tokenizer: str = "byte", out: str | Path = "shards/stdlib", shards: int = 4,
    val_fraction: float = 0.05, seed: int = 0, split: str = "text", bad_utf8: str = "replace", strict: bool = False,
    eod: str | None = None, comm: MPI.Intracomm | None = None, say: bool = True,
) -> Index:
    """Make shards of a source; returns their index on every rank. Collective over comm (None: this process alone).

    split: "text" (the last val_fraction of the stream is validation) or "document" (whole documents by a hash of seed,
    file name and number in the file; seed has no other use). eod: the end-of-document token of a given tokenizer.json.
    say: print a summary on rank 0. UsageError for options that cannot be, DataError for sources that cannot be read:
    the shards of OUT are then as they were.
    """
    began, team, out = time.monotonic(), Team(comm), Path(out)
    scratch, is_new = out / SCRATCH, not out.exists()
    found = None
    with team.together():
        check_options(shards, val_fraction, split, bad_utf8, tokenizer)
        if team.rank == 0:
            ours = _names_in(out)
            found = find_files(source, leave_out=out)
            _make_scratch(out, ours)
    files, about = team.bcast(found)
    try:
        reader = Reader(bad_utf8, strict, alone=about["kind"] == "file")
        mine = _share(files, team.rank, team.size)
        encoder = make_tokenizer(tokenizer, eod, files, mine, reader, team)
        with team.together():
            val_share = val_fraction if split == "document" else 0.0
            raws = _encode(mine, reader, encoder, scratch, team.rank, val_share, seed)
        all_raws, counts = team.allgather(raws), Counts()
        for other in team.allgather(reader.counts):
            counts.add(other)
        index = _write(all_raws, counts, encoder, about | counts.left_out(), shards, val_fraction, out, team)
    finally:
        if team.rank == 0 and not _is_half_replaced(out):
            shutil.rmtree(scratch, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # only when nothing came of it
                    out.rmdir()
    if say and team.rank == 0:
        print(_summary(out, index, counts, time.monotonic() - began, team.size), flush=True)
    return index


def check_options(shards: int, val_fraction: float, split: str, bad_utf8: str, tokenizer: str) -> None:
    """UsageError for what cannot be, before anything is read. Independent."""
    if shards < 1:
        raise UsageError(f"--shards {shards} must be at least 1")
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction} must be in [0, 1)")
    if split not in ("text", "document"):
        raise UsageError(f"--split {split} must be text or document")
    if bad_utf8 not in ("replace", "skip"):
        raise UsageError(f"--bad-utf8 {bad_utf8} must be replace or skip")
    check_tokenizer(tokenizer)


def _names_in(out: Path) -> set[str]:
    """The shards in OUT, all of our own making (a killed run's too), or UsageError."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is not a folder; choose another")
    ours: set[str] = set()
    for name in ("index.json", f"{SCRATCH}/old.json", f"{SCRATCH}/new.json"):
        if (out / name).exists():
            try:
                ours |= {record.name for record in read_index(out, name).files}
            except DataError as error:
                if name == "index.json":
                    raise UsageError(f"--out {out} holds an index that cannot be replaced safely ({error}); "
                                     "choose another folder, or remove its files yourself") from None
    if foreign := sorted(path.name for path in out.glob("*.h5") if path.name not in ours):
        more = " and others" if foreign[1:] else ""
        raise UsageError(f"--out {out} holds {foreign[0]}{more}, which no index.json lists; nothing was touched: "
                         "choose another folder, or remove these files yourself")
    return {name for name in ours if (out / name).exists()}


def _is_half_replaced(out: Path) -> bool:
    """Whether a run stopped between the old index and the new: its scratch folder then knows whose the shards are."""
    return (out / SCRATCH / "new.json").exists() and not (out / "index.json").exists()


def _make_scratch(out: Path, ours: set[str]) -> None:
    try:
        if _is_half_replaced(out):
            for name in ours:
                (out / name).unlink()
        shutil.rmtree(out / SCRATCH, ignore_errors=True)  # of a run that was killed
        (out / SCRATCH).mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"cannot write to --out {out}: {error.strerror}; choose another folder") from None


def _share(files: list[SourceFile], rank: int, size: int) -> list[SourceFile]:
    """A rank's run of files: those whose middle byte falls into its part of all bytes."""
    total, before, mine = sum(f.size for f in files) or 1, 0, []
    for f in files:
        if min(size - 1, (2 * before + f.size) * size // (2 * total)) == rank:
            mine.append(f)
        before += f.size
    return mine


def _encode(
    files: list[SourceFile], reader: Reader, encoder: Tokenizer, scratch: Path, rank: int, val_share: float, seed: int
) -> dict[str, Raw]:
    """Encode a rank's files into its raw files, by stream."""
    dtype = token_dtype(encoder.vocab_size)
    names = ("train", "val") if val_share else ("train",)
    writers = {name: RawWriter(scratch, f"{name}-{rank}", dtype) for name in names}
    for batch in _batches(_routed(files, reader, val_share, seed)):
        encoded = iter(encoder.encode_batch([text for _, text in batch if text is not None]))
        for name, text in batch:
            if text is None:
                writers[name].end_document(encoder.eod)
            else:
                writers[name].add(next(encoded))
    return {name: writer.close() for name, writer in writers.items()}


def _routed(files: list[SourceFile], reader: Reader, val_share: float, seed: int) -> Iterator[tuple[str, str | None]]:
    """Each piece of text (None: the end of a document) with the stream that it belongs to."""
    for file in files:
        number = 0
        for text in reader.pieces(file):
            yield "val" if val_share and _drawn(seed, file.name, number) < val_share else "train", text
            number += text is None


def _drawn(seed: int, name: str, number: int) -> float:
    """A number in [0, 1) for a document, whatever else is in the corpus."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{number}".encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def _batches(pieces: Iterator[tuple[str, str | None]]) -> Iterator[list[tuple[str, str | None]]]:
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[1] or "") + 1
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _write(
    raws: list[dict[str, Raw]], counts: Counts, encoder: Tokenizer, about: dict[str, object], shards: int,
    val_fraction: float, out: Path, team: Team,
) -> Index:
    """Cut the shards, each rank some, and put them in place. Collective."""
    streams = {name: Stream([raw[name] for raw in raws]) for name in raws[0]}
    stored = encoder.to_json()
    sha256 = hashlib.sha256(stored.encode()).hexdigest()
    plans: list[ShardPlan] = []
    with team.together():
        if not counts.documents:
            raise DataError(f"the source has no text at all ({counts}); give --source a file or folder with text")
        plans = plan_shards(streams, shards, val_fraction)
        mine = {i: cut_shard(plan, streams[plan.stream], out / SCRATCH, encoder, sha256)
                for i, plan in enumerate(plans) if i % team.size == team.rank}
    by_number: dict[int, FileRecord] = {}
    for other in team.allgather(mine):
        by_number |= other
    files = [by_number[i] for i in range(len(plans))]
    splits = {}
    for split in dict.fromkeys(plan.split for plan in plans):
        of_split = [f for f in files if f.split == split]
        splits[split] = SplitRecord(sum(f.tokens for f in of_split), sum(f.documents for f in of_split),
                                    sum(f.text_bytes for f in of_split), loss_mask=False)
    index = Index(encoder.vocab_size, encoder.eod, encoder.kind, sha256, splits, files, about)
    with team.together():
        if team.rank == 0:
            _put_in_place(out, index, stored)
    return index


def _put_in_place(out: Path, index: Index, tokenizer: str) -> None:
    """Old index away, new shards in, stale ones out, new index last; _names_in knows every state in between."""
    scratch, stale = out / SCRATCH, _names_in(out) - {record.name for record in index.files}
    write_atomically(scratch / "new.json", index.to_json())
    if (out / "index.json").exists():
        os.replace(out / "index.json", scratch / "old.json")
    for record in index.files:
        os.replace(scratch / record.name, out / record.name)
    for name in stale:
        (out / name).unlink()
    write_atomically(out / "tokenizer.json", tokenizer)
    write_atomically(out / "index.json", index.to_json())
    shutil.rmtree(scratch, ignore_errors=True)  # before the other ranks go on


def _summary(out: Path, index: Index, counts: Counts, seconds: float, ranks: int) -> str:
    per_token = sum(s.text_bytes for s in index.splits.values()) / sum(s.tokens for s in index.splits.values())
    splits = ", ".join(f"{name} {s.tokens:,} tokens" for name, s in index.splits.items())
    lines = [
        f"{out}: {len(index.files)} shards of {counts.documents:,} documents from {counts.files:,} files",
        f"  {splits}; vocabulary {index.vocab_size:,} ({index.tokenizer_kind}), {per_token:.2f} bytes per token",
        *(f"  {line}" for line in counts.complaints()),
        f"  {seconds:.1f} s on {ranks} rank{'s' if ranks > 1 else ''}",
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line. Collective over COMM_WORLD."""
    parser = Parser(prog="python -m data_tools.prepare", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", default="stdlib", help="stdlib (Python's own standard library: .py files without site-packages, "
        "dist-packages, __pycache__, test and tests folders), a file, or a folder: text, .jsonl[.gz|.zst], .parquet")
    add("--tokenizer", default="byte", help="byte, char, bpe:VOCAB (trained here) or a tokenizer.json (%(default)s)")
    add("--out", default="shards/stdlib", help="the folder to write (%(default)s)")
    add("--shards", type=int, default=4, help="training files (%(default)s)")
    add("--val-fraction", type=float, default=0.05, help="of the tokens or documents; 0: no validation (%(default)s)")
    add("--split", default="text", help="text: the stream's end is validation; document: whole documents (%(default)s)")
    add("--seed", type=int, default=0, help="of --split document (%(default)s)")
    add("--bad-utf8", default="replace", help="replace or skip documents that are not UTF-8 (%(default)s)")
    add("--strict", action="store_true", help="a malformed .jsonl line is an error instead of skipped")
    add("--eod", help="the end-of-document token of a given tokenizer.json, when it has no usual name")
    options, world = begin(lambda: vars(parser.parse_args()))
    if world.size > 1:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the ranks take the cores
    prepare(**options, comm=world if world.size > 1 else None)


if __name__ == "__main__":
    run_entry(main)

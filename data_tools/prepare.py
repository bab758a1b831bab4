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
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.chat import Template, find_template
from data_tools.counts import Counts
from data_tools.cut import Raw, ShardPlan, Stream, Tokens, cut_shard, plan_shards
from data_tools.encode import Routing, encode_rows, encode_text
from data_tools.mixture import in_words, lay_out, parse_sources, shares
from data_tools.options import Options, check_options
from data_tools.rows import RowReader
from data_tools.sources import Reader, SourceFile, find_files
from data_tools.team import Team
from data_tools.vocabulary import make_tokenizer
from mpidp.data.index import FileRecord, Index, SplitRecord, read_index
from mpidp.data.tokenizer import Tokenizer
from mpidp.errors import DataError, UsageError
from mpidp.runtime.command import Parser, begin, run_entry
from mpidp.runtime.files import write_atomically

if TYPE_CHECKING:
    from mpi4py import MPI

Found = tuple[list[SourceFile], dict[str, Any]]  # the files of a source, and what index.json says of it
SCRATCH = ".prepare"  # the temporary folder in OUT


def prepare(
    source: str | Sequence[str] = "stdlib", tokenizer: str = "byte", out: str | Path = "shards/stdlib", shards: int = 4,
    val_fraction: float = 0.05, seed: int = 0, split: str = "", bad_utf8: str = "replace", strict: bool = False,
    eod: str | None = None, comm: MPI.Intracomm | None = None, say: bool = True, form: str = "text",
    chat_template: str | None = None, seq_len: int = 0, truncate: bool = False, tokens: int = 0, repeat: bool = False,
) -> Index:
    """Make shards of a source; returns their index on every rank. Collective over comm (None: this process alone).

    source: one, or several of a mixture as PATH:WEIGHT, of `tokens` in all (0: until a source has run out; repeat: it begins
    again). form: "text", or rows of which a part is learned (rows.py): "prompt_completion", "chat"; rows are packed so that none
    crosses a multiple of seq_len tokens. split: "text" (the last val_fraction of the stream is validation) or "document" (whole
    documents by a hash of seed, file name and number in the file; seed has no other use); rows are split by document. eod: the
    end-of-document token of a given tokenizer.json. say: print a summary on rank 0. UsageError for options that cannot be,
    DataError for sources that cannot be read: the shards of OUT are then as they were.
    """
    began, team, out = time.monotonic(), Team(comm), Path(out)
    scratch, is_new = out / SCRATCH, not out.exists()
    found: tuple[list[Found], Template | None] | None = None
    with team.together():
        options = Options(
            parse_sources(source), tokenizer, shards, val_fraction, seed, split or ("text" if form == "text" else "document"),
            bad_utf8, strict, form, seq_len, truncate, tokens, repeat,
        )
        check_options(options, chat_template)
        if team.rank == 0:
            ours = _names_in(out)
            template = find_template(chat_template, tokenizer) if form == "chat" else None
            found = [find_files(one.path, leave_out=out) for one in options.sources], template
            _make_scratch(out, ours)
    corpora, template = team.bcast(found)
    try:
        mine = [_share(files, team.rank, team.size) for files, _ in corpora]
        readers = [_reader(options, template, about["kind"] == "file") for _, about in corpora]
        encoder = make_tokenizer(
            tokenizer, eod, [f for files, _ in corpora for f in files], [f for files in mine for f in files], readers[0], team
        )
        with team.together():
            encoded = [_encode(options, s, mine[s], readers[s], encoder, scratch, team.rank) for s in range(len(mine))]
        all_raws, counts = team.allgather(encoded), Counts()
        for other in team.allgather([reader.counts for reader in readers]):
            for of_source in other:
                counts.add(of_source)
        index = _write(all_raws, counts, encoder, [about for _, about in corpora], options, out, team)
    finally:
        if team.rank == 0 and not _is_half_replaced(out):
            shutil.rmtree(scratch, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # only when nothing came of it
                    out.rmdir()
    if say and team.rank == 0:
        print(_summary(out, index, counts, options, time.monotonic() - began, team.size), flush=True)
    return index


def _reader(options: Options, template: Template | None, alone: bool) -> Reader:
    if options.form == "text":
        return Reader(options.bad_utf8, options.strict, alone)
    return RowReader(options.bad_utf8, options.strict, alone, template=template)


def _encode(
    options: Options, source: int, files: list[SourceFile], reader: Reader, encoder: Tokenizer, scratch: Path, rank: int
) -> dict[str, Raw]:
    """A rank's files of one source as raw files, by stream."""
    routing = Routing(scratch, source, rank, options.val_fraction if options.split == "document" else 0.0, options.seed)
    if isinstance(reader, RowReader):
        return encode_rows(files, reader, encoder, routing, options.seq_len, options.truncate)
    return encode_text(files, reader, encoder, routing)


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


def _write(
    raws: list[list[dict[str, Raw]]], counts: Counts, encoder: Tokenizer, abouts: list[dict[str, Any]], options: Options,
    out: Path, team: Team,
) -> Index:
    """Cut the shards, each rank some, and put them in place. raws: by rank, source and stream. Collective."""
    stored = encoder.to_json()
    sha256 = hashlib.sha256(stored.encode()).hexdigest()
    plans: list[ShardPlan] = []
    with team.together():
        if not counts.documents:
            raise DataError(f"the source has no text at all ({counts}); give --source a file or folder with text")
        streams, told = _streams(raws, encoder.eod, options)
        plans = plan_shards(streams, options.shards, options.val_fraction)
        mine = {i: cut_shard(plan, streams[plan.stream], out / SCRATCH, encoder, sha256)
                for i, plan in enumerate(plans) if i % team.size == team.rank}
    by_number: dict[int, tuple[FileRecord, int]] = {}
    for other in team.allgather(mine):
        by_number |= other
    files, learned = [by_number[i][0] for i in range(len(plans))], sum(count for _, count in by_number.values())
    rows, splits = options.form != "text", {}
    for split in dict.fromkeys(plan.split for plan in plans):
        of_split = [f for f in files if f.split == split]
        splits[split] = SplitRecord(sum(f.tokens for f in of_split), sum(f.documents for f in of_split),
                                    sum(f.text_bytes for f in of_split), loss_mask=rows)
    about = {"kind": "mixture", "sources": [a | one for a, one in zip(abouts, told, strict=True)]} if told else abouts[0]
    about = about | ({"format": options.form, "learned_tokens": learned} if rows else {}) | counts.left_out()
    index = Index(encoder.vocab_size, encoder.eod, encoder.kind, sha256, splits, files, about, window=options.seq_len)
    with team.together():
        if team.rank == 0:
            _put_in_place(out, index, stored)
    return index


def _streams(
    raws: list[list[dict[str, Raw]]], eod: int, options: Options
) -> tuple[dict[str, Tokens], list[dict[str, Any]]]:
    """What is cut, by split, and of a mixture what index.json says of each source."""
    parts = {name: [Stream([of_rank[s][name] for of_rank in raws]) for s in range(len(options.sources))] for name in raws[0][0]}
    if not options.arranged:
        return {name: streams[0] for name, streams in parts.items()}, []
    found: dict[str, Tokens] = {}
    given = [(0, 0)] * len(options.sources)
    for name, streams in parts.items():
        if any(stream.tokens for stream in streams) or name == "train":
            found[name], taken = lay_out(
                name, streams, options.sources, options.tokens_of(name), options.repeat, options.seq_len, eod
            )
            given = [(a + c, b + d) for (a, b), (c, d) in zip(given, taken, strict=True)]
        else:
            found[name] = streams[0]
    there = [sum(raw[s][name].documents for raw in raws for name in parts) for s in range(len(options.sources))]
    mixed = len(options.sources) > 1 or options.tokens > 0
    return found, shares(options.sources, given, there) if mixed else []


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


def _summary(out: Path, index: Index, counts: Counts, options: Options, seconds: float, ranks: int) -> str:
    per_token = sum(s.text_bytes for s in index.splits.values()) / sum(s.tokens for s in index.splits.values())
    splits = ", ".join(f"{name} {s.tokens:,} tokens" for name, s in index.splits.items())
    documents = sum(s.documents for s in index.splits.values())
    lines = [
        f"{out}: {len(index.files)} shards of {documents:,} documents from {counts.files:,} files",
        f"  {splits}; vocabulary {index.vocab_size:,} ({index.tokenizer_kind}), {per_token:.2f} bytes per token",
        *(f"  {line}" for line in in_words(options.sources, index.source.get("sources", []))),
        *(f"  {line}" for line in counts.complaints()),
        f"  {seconds:.1f} s on {ranks} rank{'s' if ranks > 1 else ''}",
    ]
    if index.window:
        learned = index.source["learned_tokens"]
        share = learned / sum(s.tokens for s in index.splits.values())
        lines[2:2] = [f"  {learned:,} tokens are learned ({share:.0%}); rows lie whole in windows: model.seq_len={index.window}"]
    return "\n".join(lines)


def main() -> None:
    """The command line. Collective over COMM_WORLD."""
    parser = Parser(prog="python -m data_tools.prepare", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", action="append", help="stdlib (Python's own standard library: .py files without site-packages, "
        "dist-packages, __pycache__, test and tests folders), a file, or a folder: text, .jsonl[.gz|.zst], .parquet; several as "
        "PATH:WEIGHT are a mixture (stdlib)")
    add("--format", dest="form", default="text", help="text, or rows of .jsonl of which a part is learned: prompt_completion "
        "(fields prompt, completion), chat (messages of role, content) (%(default)s)")
    add("--chat-template", metavar="FILE", help="of --format chat, where there is none beside the tokenizer.json")
    add("--seq-len", type=int, default=0, help="of rows: none crosses a multiple of so many tokens; train with the same")
    add("--truncate", action="store_true", help="cut rows of more than --seq-len tokens instead of leaving them out")
    add("--tokens", type=int, default=0, help="so many in all, by the weights of the sources; 0: until one has run out")
    add("--repeat", action="store_true", help="a source that has run out begins again")
    add("--tokenizer", default="byte", help="byte, char, bpe:VOCAB (trained here) or a tokenizer.json (%(default)s)")
    add("--out", default="shards/stdlib", help="the folder to write (%(default)s)")
    add("--shards", type=int, default=4, help="training files (%(default)s)")
    add("--val-fraction", type=float, default=0.05, help="of the tokens or documents; 0: no validation (%(default)s)")
    add("--split", default="", help="text: the stream's end is validation; document: whole documents (text; of rows document)")
    add("--seed", type=int, default=0, help="of --split document (%(default)s)")
    add("--bad-utf8", default="replace", help="replace or skip documents that are not UTF-8 (%(default)s)")
    add("--strict", action="store_true", help="a malformed, empty or too long .jsonl line is an error instead of skipped")
    add("--eod", help="the end-of-document token of a given tokenizer.json, when it has no usual name")
    options, world = begin(lambda: vars(parser.parse_args()))
    options["source"] = options["source"] or "stdlib"
    if world.size > 1:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the ranks take the cores
    prepare(**options, comm=world if world.size > 1 else None)


if __name__ == "__main__":
    run_entry(main)

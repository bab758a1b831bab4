"""Converts text to shards: `[mpirun -np N] python -m data_tools.prepare --source DIR --tokenizer bpe:8192 --out shards/mine`.

The shards are identical for any number of ranks. Each rank encodes whole files into raw temporary files in OUT. All ranks encode
about the same number of bytes. The temporary files of all ranks, one after the other, form one stream of tokens. Each rank then
writes some of the shards from this stream. Memory use does not grow with the corpus. Existing shards in OUT are replaced only
after the new ones are complete.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.counts import Counts
from data_tools.cut import Raw, ShardPlan, Stream, Tokens, cut_shard, plan_shards
from data_tools.encode import Routing, encode_rows, encode_text
from data_tools.files import SourceFile, find_files
from data_tools.mixture import lay_out, mixture_lines, mixture_record, parse_sources
from data_tools.options import PrepareOptions, add_options, check_options
from data_tools.out_folder import OutFolder
from data_tools.progress import Ticker
from data_tools.rows import RowReader
from data_tools.sources import SourceReader
from data_tools.special_table import completed_table, find_template, table_of
from data_tools.team import Team
from data_tools.vocabulary import Corpus, make_tokenizer
from mpidp.data.chat_template import Template
from mpidp.data.encoder import Encoder
from mpidp.data.index import FileRecord, Index, SplitRecord, read_index
from mpidp.data.special_tokens import SpecialTokens
from mpidp.data.tokenizer import Tokenizer
from mpidp.errors import DataError, UsageError
from mpidp.runtime.command import Parser, begin, run_entry
from mpidp.runtime.log import counted, printable
from mpidp.runtime.options import program
from mpidp.storage.address import check_local

if TYPE_CHECKING:
    from mpi4py import MPI

Found = tuple[list[SourceFile], dict[str, Any], list[str]]  # see find_files


def prepare(
    source: str | Sequence[str] = "stdlib", tokenizer: str = "byte", out: str | Path = "shards/stdlib", shards: int = 4,
    val_fraction: float = 0.05, *, comm: MPI.Intracomm | None = None, verbose: bool = True, wait: bool = False, **others: Any,
) -> Index:
    """Prepare shards from a source. Return the index of the shards on every rank. Collective over comm (None: a single process).

    `source`: a path, or several PATH:WEIGHT for a mixture. `others`: the other fields of PrepareOptions. `verbose`: whether rank
    0 prints a summary. `wait`: whether to wait until no other process prepares OUT. If OUT then has shards, their index is
    returned. Raises UsageError if an option is invalid, if OUT cannot be written, or, without `wait`, if another process prepares
    OUT. Raises DataError if a source cannot be read. If an error occurs before the new shards are complete, OUT stays unchanged.
    """
    began, team, folder = time.monotonic(), Team(comm), OutFolder(Path(out))
    found: tuple[list[Found], SpecialTokens, Template | None] | None = None
    with team.raise_together():
        options = PrepareOptions(parse_sources(source), tokenizer, shards, val_fraction, **others)
        check_local("--tokenizer", tokenizer)
        check_local("--out", str(out))
        check_options(options)
        if team.rank == 0:
            folder.names()
            table = table_of(tokenizer, options.eod)
            template = find_template(options, table) if options.form == "chat" else None
            found = [find_files(one.path, leave_out=folder.path) for one in options.sources], table, template
            found = found if folder.open(wait) else None
    received = team.bcast(found)
    if received is None:
        with team.raise_together():
            folder.close()
        return read_index(folder.path)
    corpora, table, template = received
    ticker = Ticker(_title(team), quiet=not verbose or team.rank > 0)
    try:
        own_files = [_files_of_rank(files, team.rank, team.size) for files, _, _ in corpora]
        readers = [_reader(options, template, about["kind"] == "file", ticker) for _, about, _ in corpora]
        texts = [Corpus(files, own, reader) for (files, _, _), own, reader in zip(corpora, own_files, readers, strict=True)]
        ticker.phase("text for the tokenizer")
        made = make_tokenizer(tokenizer, options.eod, texts, team, ticker)
        table = completed_table(table, made, template, options)
        encoder = Encoder(made, table, options.special or (table.special if options.rows else "text"))
        ticker.phase("encoded", sum(map(len, own_files)))
        with team.raise_together():
            encoded = [
                _encode(options, s, files, readers[s], encoder, folder.scratch, team.rank) for s, files in enumerate(own_files)
            ]
        all_raws, counts = team.allgather(encoded), Counts.total(team.allgather([reader.counts for reader in readers]))
        index = _write(all_raws, counts, made, table, [about for _, about, _ in corpora], options, folder, team, ticker)
    finally:
        ticker.close()
        folder.close()
    if verbose and team.rank == 0:
        remarks = [remark for _, _, of_source in corpora for remark in of_source]
        remarks += [f"encoded by {made.program}"] if made.program else []
        seconds = time.monotonic() - began
        summary = _summary(folder.path, index, remarks + counts.complaints(), counts.files, options, seconds, team.size)
        print(printable(summary), flush=True)
    return index


def _title(team: Team) -> str:
    return "prepare" if team.size == 1 else f"prepare, rank 0 of {team.size}"


def _reader(options: PrepareOptions, template: Template | None, alone: bool, ticker: Ticker) -> SourceReader:
    if not options.rows:
        return SourceReader(options.bad_utf8, options.strict, alone, text_key=options.text_key, ticker=ticker)
    return RowReader(options.bad_utf8, options.strict, alone, template=template, ticker=ticker)


def _encode(
    options: PrepareOptions, source: int, files: list[SourceFile], reader: SourceReader, encoder: Encoder, scratch: Path,
    rank: int,
) -> dict[str, Raw]:
    """Encode this rank's files of source number `source`. Return {stream's name: raw files}."""
    routing = Routing(scratch, source, rank, options.val_fraction if options.by_document else 0.0, options.seed)
    if isinstance(reader, RowReader):
        return encode_rows(files, reader, encoder, routing, options.seq_len, options.truncate)
    return encode_text(files, reader, encoder, routing)


def _files_of_rank(files: list[SourceFile], rank: int, size: int) -> list[SourceFile]:
    """Return the files of this rank. The bytes of all files are divided evenly among the ranks, and a file belongs to the rank
    that has its middle byte."""
    total, before, selected = sum(f.size for f in files) or 1, 0, []
    for f in files:
        if min(size - 1, (2 * before + f.size) * size // (2 * total)) == rank:
            selected.append(f)
        before += f.size
    return selected


def _write(
    raws: list[list[dict[str, Raw]]], counts: Counts, encoder: Tokenizer, table: SpecialTokens, abouts: list[dict[str, Any]],
    options: PrepareOptions, out: OutFolder, team: Team, ticker: Ticker,
) -> Index:
    """Write the shards and move them to OUT. Each rank writes some of the shards. Return the index. `raws`: raws[r][s][name]
    are the raw files of rank r for source s and the stream `name`. Collective over the team."""
    stored, special = encoder.to_json(), "" if table.is_plain else table.to_json()
    sha256 = hashlib.sha256(stored.encode()).hexdigest()
    plans: list[ShardPlan] = []
    with team.raise_together():
        if not counts.documents:
            raise DataError(counts.no_text())
        try:
            streams, mixture = _streams(raws, encoder.eod, options)
            plans = plan_shards(streams, options.shards, options.val_fraction, options.advice)
        except DataError as error:
            raise DataError(f"{error}{counts.reasons()}") from None
        own_plans = {i: plan for i, plan in enumerate(plans) if i % team.size == team.rank}
        ticker.phase("written", len(own_plans), "shard")
        written = {}
        for i, plan in own_plans.items():
            ticker.add(parts=1)
            written[i] = record, _ = cut_shard(plan, streams[plan.stream], out.scratch, encoder, sha256)
            ticker.add(record.documents, record.size)
    by_number: dict[int, tuple[FileRecord, int]] = {}
    for of_rank in team.allgather(written):
        by_number |= of_rank
    files, learned = [by_number[i][0] for i in range(len(plans))], sum(count for _, count in by_number.values())
    splits = {}
    for split in dict.fromkeys(plan.split for plan in plans):
        of_split = [f for f in files if f.split == split]
        splits[split] = SplitRecord(sum(f.tokens for f in of_split), sum(f.documents for f in of_split),
                                    sum(f.text_bytes for f in of_split), loss_mask=options.rows)
    about = {"kind": "mixture", "sources": [a | one for a, one in zip(abouts, mixture, strict=True)]} if mixture else abouts[0]
    about = about | ({"format": options.form, "learned_tokens": learned} if options.rows else {}) | counts.left_out()
    index = Index(encoder.vocab_size, encoder.eod, encoder.kind, sha256, splits, files, about, window=options.seq_len,
                  special_tokens_sha256=hashlib.sha256(special.encode()).hexdigest() if special else "")
    with team.raise_together():
        if team.rank == 0:
            out.put_in_place(index, stored, special)
    return index


def _streams(
    raws: list[list[dict[str, Raw]]], eod: int, options: PrepareOptions
) -> tuple[dict[str, Tokens], list[dict[str, Any]]]:
    """Return (streams, records). streams: the tokens of each split by name. records: for a mixture, the record of each source
    for index.json, else []. `raws`: see _write()."""
    parts = {name: [Stream([of_rank[s][name] for of_rank in raws]) for s in range(len(options.sources))] for name in raws[0][0]}
    if not options.arranged:
        return {name: streams[0] for name, streams in parts.items()}, []
    found: dict[str, Tokens] = {}
    taken = [(0, 0)] * len(options.sources)
    for name, streams in parts.items():
        if any(stream.tokens for stream in streams) or name == "train":
            found[name], of_split = lay_out(
                name, streams, options.sources, options.tokens_of(name), options.repeat, options.seq_len, eod
            )
            taken = [(a + c, b + d) for (a, b), (c, d) in zip(taken, of_split, strict=True)]
        else:
            found[name] = streams[0]
    available = [sum(raw[s][name].documents for raw in raws for name in parts) for s in range(len(options.sources))]
    mixed = len(options.sources) > 1 or options.tokens > 0
    return found, mixture_record(options.sources, taken, available) if mixed else []


def _summary(
    out: Path, index: Index, remarks: list[str], files: int, options: PrepareOptions, seconds: float, ranks: int
) -> str:
    per_token = sum(s.text_bytes for s in index.splits.values()) / sum(s.tokens for s in index.splits.values())
    splits = ", ".join(f"{name} {s.tokens:,} tokens" for name, s in index.splits.items())
    documents = sum(s.documents for s in index.splits.values())
    shards = counted(len(index.files), "shard")
    lines = [
        f"{out}: {shards} with {counted(documents, 'document')} in total, from {counted(files, 'file')}",
        f"  {splits}; vocabulary {index.vocab_size:,} ({index.tokenizer_kind}), {per_token:.2f} bytes per token",
        *(f"  {line}" for line in mixture_lines(options.sources, index.source.get("sources", []))),
        *(f"  {line}" for line in remarks),
        f"  {seconds:.1f} s on {counted(ranks, 'rank')}",
    ]
    if index.window:
        learned = index.source["learned_tokens"]
        share = learned / sum(s.tokens for s in index.splits.values())
        lines[2:2] = [f"  loss on {learned:,} tokens ({share:.0%}); rows are packed: train with model.seq_len={index.window}"]
    return "\n".join(lines)


def main() -> None:
    """Run the command. Collective over COMM_WORLD."""
    parser = Parser(prog=program("data_tools.prepare"), description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options, world = begin(lambda: vars(parser.parse_args()))
    options["source"] = options["source"] or "stdlib"
    workers = options.pop("workers")
    if workers < 0:
        raise UsageError(f"--workers {workers} must be at least 0")
    if workers:
        os.environ |= {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    elif world.size > 1:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the ranks already use all cores
    prepare(**options, comm=world if world.size > 1 else None)


if __name__ == "__main__":
    run_entry(main)

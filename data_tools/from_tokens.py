"""Writes shards from a dataset of tokens, in any format of the table (formats/table.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.arrange import Arrangement, lengths_of, pack
from data_tools.block_writer import BlockWriter
from data_tools.boundaries import alone, eod_is_first, occurs, starts_by_ids, starts_of_parts, unended
from data_tools.cut import ADVICE, Stream, Tokens, cut_shard, plan_shards
from data_tools.formats.blocks import ReadOptions, SourcePart, TokenBlock, checked_ids
from data_tools.formats.flat import DTYPES
from data_tools.formats.table import FORMATS, ROWS, TokenFormat, mixed, recognized
from data_tools.new_folder import new_folder
from data_tools.progress import Ticker
from mpidp.data.index import FileRecord, Index, SplitRecord
from mpidp.data.special_tokens import FILE, SpecialTokens, special_tokens_of
from mpidp.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, token_dtype
from mpidp.errors import DataError, UsageError
from mpidp.runtime.files import write_file, writing
from mpidp.runtime.log import counted


@dataclass(frozen=True)
class FromOptions:
    """The options of `convert --from`, which converts a dataset of tokens to shards."""

    tokenizer: str  # byte, a tokenizer.json, or a folder that contains one
    shards: int = 4
    val_fraction: float = 0.05  # share of the tokens, if the source has no validation split
    eod: str | None = None  # the end-of-document token
    eod_at: str = "auto"  # where this token is in a document: "end", "start", or "auto": decided by the data and the format
    dtype: str = ""
    column: str = ""
    rows: str = "auto"  # "document": a row is a document; "part": rows are concatenated; "auto": by the lengths of the rows
    whole: bool = False  # whether each split is one document
    add_eod: bool = False  # whether the end-of-document token is appended to rows that do not end with it
    seq_len: int = 0  # pack documents into windows of this many tokens; 0: do not pack

    def check(self) -> None:
        """Raise UsageError if a value is invalid. Pure."""
        if self.shards < 1:
            raise UsageError(f"--shards {self.shards} must be at least 1")
        if not 0 <= self.val_fraction < 1:
            raise UsageError(f"--val-fraction {self.val_fraction} must be at least 0 and below 1")
        if self.dtype and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype} must be one of {', '.join(DTYPES)}")
        if self.seq_len and self.seq_len < 2:
            raise UsageError(f"--seq-len {self.seq_len} must be at least 2")


def from_tokens(name: str, source: Path, out: Path, options: FromOptions) -> list[str]:
    """Convert a dataset of tokens to shards. Return lines of text for the user: one about each split, then remarks.

    `name`: the name of the source's format, or "auto". Raises UsageError if an option is invalid, if `out` exists, or if the
    source is a folder of shards. Raises DataError if the source is damaged, has another format, or does not match the
    tokenizer. After an error, `out` does not exist unless it existed before. Independent.
    """
    options.check()
    name, kind = _format_of(name, source)
    of_rows = {"--rows": options.rows != "auto", "--add-eod": options.add_eod, "--column": options.column}
    if kind.documents != ROWS and (unused := [option for option, given in of_rows.items() if given]):
        raise UsageError(f"{kind.what} files have no rows, so {', '.join(unused)} cannot be given. Formats with rows are "
                         f"{', '.join(one for one, other in FORMATS.items() if other.documents == ROWS)}")
    encoder = ByteTokenizer() if options.tokenizer == "byte" else load_tokenizer(options.tokenizer, options.eod)
    ticker = Ticker("convert")
    try:
        with new_folder(out) as (new, scratch):
            reading = ReadOptions(encoder.vocab_size, scratch, options.dtype, options.column)
            writers = _read(kind, source, reading, encoder, options, ticker)
            remarks = _find_documents(kind, writers, encoder, options, reading.divided)
            index = _write(writers, encoder, new, options, {"kind": name, "path": str(source)}, ticker)
    finally:
        ticker.close()
    lines = [f"{out}: {split} {counted(record.tokens, 'token')}, {counted(record.documents, 'document')}"
             for split, record in index.splits.items()]
    if skipped := reading.skipped:
        remarks.append(f"{counted(skipped, 'document')} without tokens {'was' if skipped == 1 else 'were'} skipped")
    if any(record.loss_mask for record in index.splits.values()) and not options.seq_len:
        remarks.append("the data have a loss mask, but training windows will cut documents. To pack whole documents into "
                       "windows, give --seq-len N")
    return lines + reading.remarks + remarks


def _format_of(name: str, source: Path) -> tuple[str, TokenFormat]:
    """Return (name, format) of a source. If `name` is "auto", the format is recognized. Raises DataError if the source has
    another format than `name`, or if no format is recognized. Raises UsageError if the source is a folder of shards."""
    if (source / "index.json").is_file() and any(source.glob("*.h5")):
        raise UsageError(f"{source} is a folder of shards; to convert shards to another format, give --to FORMAT")
    looks = recognized(source)
    if name == "auto":
        if looks is None:
            there = "holds no tokens in a format that convert knows" if source.exists() else "does not exist"
            raise DataError(f"{source} {there}. The formats are {', '.join(FORMATS)}. To make shards from text, use mpidp "
                            "prepare")
        if len(kinds := mixed(source)) > 1:
            raise DataError(f"{source} holds files of several kinds, {', '.join(kinds)}. Name the kind to read, for example "
                            f"--from {looks}, or give a folder or file that holds one kind")
        return looks, FORMATS[looks]
    kind = FORMATS[name]
    if looks is not None and looks != name and not kind.recognize(source):
        raise DataError(f"{source} is not {kind.what}, but looks like {FORMATS[looks].what}: use --from {looks}")
    return name, kind


def _read(
    kind: TokenFormat, source: Path, reading: ReadOptions, encoder: Tokenizer, options: FromOptions, ticker: Ticker
) -> dict[str, BlockWriter]:
    parts = kind.find(source, reading.remarks)
    writers = {split: BlockWriter(reading.scratch, split, token_dtype(encoder.vocab_size), options.seq_len > 0)
               for split in dict.fromkeys(("train", *(part.split for part in parts)))}
    ticker.phase("read", len(parts))
    for split, writer in writers.items():
        for part in parts:
            if part.split == split:
                writer.begin_part()
                ticker.add(parts=1)
                for block in _blocks(kind, part, reading, encoder, options):
                    writer.add(block)
                    ticker.add(0 if block.starts is None else len(block.starts), block.ids.nbytes)
        writer.close()
    return writers


def _blocks(
    kind: TokenFormat, part: SourcePart, reading: ReadOptions, encoder: Tokenizer, options: FromOptions
) -> Iterator[TokenBlock]:
    at = 0
    for block in kind.read(part.path, reading):
        block = checked_ids(block, reading, part.path, at)
        at += len(block.ids)
        yield _with_eod(block, encoder.eod) if options.add_eod and kind.documents == ROWS else block


def _with_eod(block: TokenBlock, eod: int) -> TokenBlock:
    """Return a copy of a block of rows, in which each row ends with the end-of-document token. An appended token is in the
    loss if the token before it is in the loss. Pure."""
    assert block.starts is not None
    ends = np.append(block.starts[1:], len(block.ids))[: len(block.starts)]
    short = block.ids[ends - 1] != eod
    mask = None if block.mask is None else np.insert(block.mask, ends[short], block.mask[ends[short] - 1])
    starts = block.starts + np.concatenate([[0], np.cumsum(short)[:-1]]).astype(np.int64) if len(ends) else block.starts
    return TokenBlock(np.insert(block.ids.astype(np.int64), ends[short], eod), starts, mask)


def _find_documents(
    kind: TokenFormat, writers: dict[str, BlockWriter], encoder: Tokenizer, options: FromOptions, divided: bool
) -> list[str]:
    """Find the document starts if the format does not store them, and store them in `writers`. Return remarks. `divided`: whether
    columns divide rows into several documents. Raises DataError if the data contains no token that ends or begins documents."""
    used = [writer for writer in writers.values() if writer.tokens]
    lengths = set().union(*(writer.lengths for writer in used))
    several = sum(writer.documents for writer in used) > 1
    one_length = len(lengths) == 1 and several and not options.add_eod and not divided
    joined = kind.documents == ROWS and (options.rows == "part" or options.rows == "auto" and one_length)
    unknown = used if joined else [writer for writer in used if not all(writer.known)]
    if options.whole:
        for writer in used:
            writer.replace_documents(iter([np.zeros(1, np.int64)]))
        return []
    if not unknown:
        return unended(used, encoder.eod)
    if not occurs(unknown, encoder.eod, encoder.bos):
        rows = ", --rows document if each row is a document" * joined
        raise DataError(f"the end-of-document token of the tokenizer, id {encoder.eod}, is not in the data, so the ends of "
                        f"documents are unknown. Give --eod TOKEN if documents end with another token{rows}, or "
                        "--one-document to treat each split as one document")
    first = options.eod_at == "start" or options.eod_at == "auto" and eod_is_first(unknown, encoder.eod, kind.eod_first)
    for writer in unknown:
        whole = starts_by_ids(writer.pieces(), encoder.eod, encoder.bos, first)
        writer.replace_documents(whole if kind.goes_on or joined else starts_of_parts(writer, encoder.eod, encoder.bos, first))
    size = f"{next(iter(lengths)):,} tokens" if len(lengths) == 1 else "different lengths"
    remarks = [f"rows of {size} were joined, and documents end with the token id {encoder.eod}. If each row is a document, "
               "give --rows document"] * joined
    packed = ". The model does not learn this token, because the first token of a packed document is not in the loss" * (
        options.seq_len > 0)
    told = f"documents begin with the token id {encoder.eod}{packed}. If documents end with this token, give --eod-at end"
    return remarks + [told] * first + alone(used, encoder.eod)


def _streams(writers: dict[str, BlockWriter], encoder: Tokenizer, options: FromOptions) -> dict[str, Tokens]:
    """Return the tokens of each split by name. If the source has no validation split, the last documents become "val" if
    the data is packed or has a loss mask. Otherwise the result has no key "val", and plan_shards() cuts the end of "train"."""
    streams = {split: Stream([writer.raw()]) for split, writer in writers.items() if writer.tokens}
    if "train" not in streams:
        raise DataError("the source has no tokens to train on. Give another file or folder")
    by_document = options.seq_len or any(stream.masked for stream in streams.values())
    if not by_document:
        return dict(streams)
    selected = {split: (stream, *lengths_of(stream)) for split, stream in streams.items()}
    stream, starts, lengths = selected["train"]
    if "val" not in streams and options.val_fraction:
        cut = int(np.searchsorted(starts, stream.tokens * (1 - options.val_fraction)))
        cut = min(max(cut, 1), len(starts) - 1)
        if cut < 1:
            raise DataError("the source has a single document, which cannot be divided into training and validation. Give "
                            "--val-fraction 0")
        selected = {"train": (stream, starts[:cut], lengths[:cut]), "val": (stream, starts[cut:], lengths[cut:])}
    return {split: _arranged(*one, encoder.eod, options.seq_len) for split, one in selected.items()}


def _arranged(stream: Stream, starts: np.ndarray, lengths: np.ndarray, eod: int, window: int) -> Arrangement:
    if window and (long := int(np.count_nonzero(lengths > window))):
        raise DataError(f"{counted(long, 'document')} {'has' if long == 1 else 'have'} more than --seq-len {window} tokens (up "
                        f"to {lengths.max()}). Give a larger --seq-len")
    which = np.zeros(len(starts), dtype=np.int64)
    if not window:
        return Arrangement([stream], which, starts, lengths, np.cumsum(lengths) - lengths, int(lengths.sum()), eod)
    places, total = pack(lengths, window)
    order = np.argsort(places, kind="stable")
    return Arrangement([stream], which, starts[order], lengths[order], places[order], total, eod)


def _write(
    writers: dict[str, BlockWriter], encoder: Tokenizer, out: Path, options: FromOptions, about: dict[str, Any], ticker: Ticker
) -> Index:
    """Write the shards, tokenizer.json, special_tokens.json (if needed) and index.json into `out`. Return the index."""
    stored = encoder.to_json()
    sha256 = hashlib.sha256(stored.encode()).hexdigest()
    streams = _streams(writers, encoder, options)
    share = options.val_fraction if "val" not in streams else 0.5  # without effect if the source has a split val
    plans = plan_shards(streams, options.shards, share)
    ticker.phase("written", len(plans), "shard")
    files: list[FileRecord] = []
    learned = 0
    for plan in plans:
        ticker.add(parts=1)
        record, of_file = cut_shard(plan, streams[plan.stream], out, encoder, sha256)
        files, learned = [*files, record], learned + of_file
        ticker.add(record.documents, record.size)
    splits = {}
    for split in dict.fromkeys(plan.split for plan in plans):
        of_split = [f for f in files if f.split == split]
        tokens, documents, text = (sum(getattr(f, key) for f in of_split) for key in ("tokens", "documents", "text_bytes"))
        stream = next(plan.stream for plan in plans if plan.split == split)
        splits[split] = SplitRecord(tokens, documents, text, loss_mask=streams[stream].masked)
    if any(one.masked for one in streams.values()):
        about |= {"learned_tokens": learned}
    special = _special(writers["train"], encoder, options.tokenizer)
    index = Index(encoder.vocab_size, encoder.eod, encoder.kind, sha256, splits, files, about, window=options.seq_len,
                  special_tokens_sha256=hashlib.sha256(special.encode()).hexdigest() if special else "")
    with writing(out, ADVICE):
        write_file(out / "tokenizer.json", stored)
        if special:
            write_file(out / FILE, special)
        write_file(out / "index.json", index.to_json())
    return index


def _special(writer: BlockWriter, encoder: Tokenizer, tokenizer: str) -> str:
    """Return the content of special_tokens.json of the shards, or "" if the shards do not need this file. The file names BOS only
    if more than half of the documents of `writer` begin with BOS."""
    path = Path(tokenizer)
    table = SpecialTokens(None, ()) if tokenizer == "byte" else special_tokens_of(path if path.is_dir() else path.parent, encoder)
    if table.bos is not None:
        begin = sum(int(np.count_nonzero(writer.at(starts) == table.bos)) for starts in writer.start_pieces())
        table = replace(table, bos=table.bos if 2 * begin > writer.documents else None)
    return "" if tokenizer == "byte" or table.is_plain else table.to_json()

"""Reads the files of a source in pieces of bounded size. Bad input is counted and skipped.

The text of a file is yielded in pieces. After each document, None is yielded. A text file is one document. In a file of rows,
each row is a document. The text of a row is in the field that --text-key names (default: `text`). Files of rows are JSON
lines, JSON arrays, .csv, .parquet and .arrow (mpidp/data/text_files.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data_tools.counts import Counts
from data_tools.files import SourceFile
from data_tools.progress import Ticker
from mpidp.data.record_batches import WITH_COLUMNS
from mpidp.data.records import Row, decoded, records
from mpidp.data.row_fields import describe, keys_of
from mpidp.data.row_forms import LISTS
from mpidp.data.text_files import NotText, TextFile, kind_of, recognize
from mpidp.data.unpack import reading
from mpidp.errors import DataError

PIECE_BYTES = 2**20  # approximate size of the pieces in which a text is read and encoded; each ends after a newline


@dataclass
class SourceReader:
    """Reads the documents of files, and counts problems. Independent."""

    bad_utf8: str = "replace"  # "replace", or "skip": skip documents with invalid UTF-8
    strict: bool = False  # whether a malformed row raises DataError
    alone: bool = False  # whether the source is a single file; if so, skipping it is an error
    counts: Counts = field(default_factory=Counts)
    text_key: str = "text"  # the field or column that holds a document
    ticker: Ticker = field(default_factory=Ticker)

    def pieces(self, file: SourceFile) -> Iterator[str | None]:
        """Yield the text of a file in pieces. After each document, yield None. Raises DataError, which names the file, if the
        file cannot be read."""
        found = self.recognize(file, (self.text_key,))
        if found is not None:
            if found.doubt:
                if self.alone and kind_of(file.name)[0] != "text":
                    raise DataError(f"{file.path} is {found.doubt}. Name the field with --text-key, or rename a copy of the "
                                    "file to .txt to read it as plain text")
                self.counts.note("doubtful", f"{file.path} ({found.doubt})")
            yield from self._text(found) if found.kind == "text" else self._documents(found)

    def records(self, file: SourceFile) -> Iterator[Row]:
        """Yield the rows of a file in order. The `fields` of a malformed row are None. A file without rows is counted and
        skipped. Raises DataError, which names the file, if the file cannot be read."""
        found = self.recognize(file, ())
        if found is not None and found.kind == "text":
            why = f" ({found.doubt})" if found.doubt else ""
            self.leave_out("binary", file, f"holds no rows{why}; use JSON lines (.jsonl), .json, .csv, .parquet or .arrow")
        elif found is not None:
            yield from records(found)

    def recognize(self, file: SourceFile, wanted: tuple[str, ...]) -> TextFile | None:
        """Count a file. Return how to read the file, or None if it is skipped. `wanted`: names of the fields or columns that
        are needed, as in mpidp.data.text_files.recognize()."""
        self.counts.files += 1
        self.ticker.add(parts=1)
        try:
            return recognize(file.path, file.name, wanted)
        except NotText as error:
            self.leave_out(error.kind, file, str(error))
            return None

    def leave_out(self, kind: str, file: SourceFile, reason: str) -> None:
        """Count a skipped file as a problem of this kind. Raises DataError instead if the file is the whole source."""
        if self.alone:
            holds_ids = Path(file.name).suffix in (".bin", ".npy", ".ds", ".mds")
            tokens = ". To make shards from token ids, use mpidp convert" * holds_ids
            raise DataError(f"{file.path} {reason}. Give --source a file or folder with text{tokens}")
        self.counts.note(kind, file.path if kind == "empty" else f"{file.path} ({reason})")

    def skip(self, kind: str, place: str, reason: str) -> None:
        """Count a skipped row as a problem of this kind. With --strict, raises DataError instead."""
        if self.strict:
            raise DataError(f"{place}: {reason}. Correct the row, or omit --strict to skip such rows")
        self.counts.note(kind, f"{place}: {reason}")

    def _text(self, file: TextFile) -> Iterator[str | None]:
        with reading(file.path):
            bad = False
            if self.bad_utf8 == "skip":
                with file.open() as stream:
                    bad = any(decoded(raw)[1] for raw in _cut(stream))
            if not bad:
                with file.open() as stream:
                    for raw in _cut(stream):
                        text, replaced = decoded(raw)
                        bad = bad or replaced
                        self.ticker.add(size=len(raw))
                        yield text
                self.counts.documents += 1
                self.ticker.add(documents=1)
                yield None
        if bad:
            self.counts.note("bad_utf8", file.path)

    def _documents(self, file: TextFile) -> Iterator[str | None]:
        for record in records(file, (self.text_key,) if file.kind in WITH_COLUMNS else ()):
            text = None if record.fields is None else record.fields.get(self.text_key)
            if record.fields is None or not isinstance(text, str):
                self.skip("malformed", record.place, record.reason or self._no_text(record.fields or {}))
                continue
            if record.bad_utf8:
                self.counts.note("bad_utf8", record.place)
                if self.bad_utf8 == "skip":
                    continue
            if not text:
                self.counts.note("empty", record.place)
                continue
            self.counts.documents += 1
            self.ticker.add(documents=1, size=len(text))
            yield from _cut_text(text)
            yield None

    def _no_text(self, fields: dict[str, object]) -> str:
        if self.text_key in fields:
            return f"`{self.text_key}` is {describe(fields[self.text_key])}, not a string"
        chat = "; for chats, give --format chat" if any(name in fields for name in LISTS) else ""
        return f"no field `{self.text_key}`; its fields are: {keys_of(fields)} (--text-key names another{chat})"


def _cut(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces of about PIECE_BYTES. Each piece ends after a newline, or between two characters if it
    contains no newline."""
    rest = b""
    while data := stream.read(PIECE_BYTES):
        data = rest + data
        end = data.rfind(b"\n") + 1
        if not end:
            end = len(data)
            while end > len(data) - 4 and end > 1 and data[end - 1] & 0xC0 == 0x80:  # continuation bytes of a character
                end -= 1
            end -= 1  # and the character's first byte
        rest = data[end:]
        if end:
            yield data[:end]
    if rest:
        yield rest


def _cut_text(text: str) -> Iterator[str]:
    """Yield the text in pieces of at most PIECE_BYTES characters. Each piece except the last ends after a newline, if it contains
    one."""
    start = 0
    while len(text) - start > PIECE_BYTES:
        stop = text.rfind("\n", start, start + PIECE_BYTES) + 1 or start + PIECE_BYTES
        yield text[start:stop]
        start = stop
    yield text[start:] if start else text

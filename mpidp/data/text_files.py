"""Recognizes the kind of a file of texts or rows by its name and first bytes. The file may be compressed. Independent.

| kind | names (in any case; also with .gz or .zst) | content |
|---|---|---|
| lines | .jsonl, .ndjson, .jsonlines; .json with one object per line | a JSON object per line |
| array | .json that is an array of objects | a JSON object per item |
| table | .csv, .tsv | a header and rows |
| parquet | .parquet, or any name with parquet's first bytes | rows |
| arrow | .arrow, or any name with the first bytes of an Arrow file | rows |
| text | all others | plain text |

A byte order mark at the start of a file is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mpidp.data.json_kind import json_kind, parse_object
from mpidp.data.row_fields import any_of, keys_of
from mpidp.data.unpack import MARK, SUFFIXES, is_regular, lines_of, open_bytes, packing, reading
from mpidp.errors import DataError

OTHER_MARKS = (b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")
PARQUET = b"PAR1"
ARROW = b"ARROW1"  # first bytes of an Arrow file; an Arrow stream has no such mark
NOT_TEXT = (
    (b"PK\x03\x04", "a zip archive: unpack it"), (b"BZh", "compressed with bzip2: decompress it (bunzip2)"),
    (b"\xfd7zXZ\0", "compressed with xz: decompress it (unxz)"),
    (b"\x04\x22\x4d\x18", "compressed with lz4: decompress it (unlz4)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive: unpack it"), (b"Rar!\x1a\x07", "a RAR archive: unpack it"),
    (b"%PDF-", "a PDF: extract its text"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"), (b"SQLite format 3\0", "an SQLite database"), (b"\x93NUMPY", "a NumPy array"),
)
KINDS = {
    ".jsonl": "lines", ".ndjson": "lines", ".jsonlines": "lines", ".json": "json", ".csv": "table", ".tsv": "table",
    ".parquet": "parquet", ".arrow": "arrow",
}
PROBE_BYTES = 8192  # the part of a file that is searched for a NUL byte, which marks a binary file
MAX_TEXT_BYTES = 2**30  # largest file that is read as one text


class NotText(ValueError):  # noqa: N818
    """A file cannot be read as text. `kind`: "empty" or "binary". The message continues a sentence that begins with
    the name of the file."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class TextFile:
    """A file, and how it is read. `doubt`: a text that describes why the file could contain rows, although it is read as plain
    text. If there is no doubt, it is ""."""

    path: str
    kind: str  # lines, array, table, parquet, arrow or text
    skip: int = 0  # bytes of the byte order mark
    separator: str = ","  # separator of the columns of a table
    doubt: str = ""

    def open(self) -> BinaryIO:
        """Open the file and skip its byte order mark. Raises OSError if the file cannot be read. Independent."""
        stream = open_bytes(self.path)
        stream.read(self.skip)
        return stream


def kind_of(name: str) -> tuple[str, str]:
    """Return (kind, suffix) of a file name. The kind of a .json file is "json" until its content is known. Pure."""
    path = Path(name.lower())
    suffix = (path.with_suffix("") if path.suffix in SUFFIXES else path).suffix
    return KINDS.get(suffix, "text"), suffix


def recognize(path: str | Path, name: str | None = None, wanted: Collection[str] = ()) -> TextFile:
    """Recognize a file by its name and first bytes. Raises NotText if the file is not text, DataError if it cannot be read, and
    UsageError if the decompressor is missing. Independent.

    `name`: the file's name (default: the name in the path). `wanted`: names of fields. A .csv or .tsv file, an array of
    objects, or a file with only one object is read as rows only if it has at least one of these fields. If `wanted` is empty,
    any fields are accepted.
    """
    path = str(path)
    with reading(path):
        if not is_regular(path):
            raise NotText("binary", "is a folder, a pipe or a device, not a regular file")
        if os.stat(path).st_size == 0:
            raise NotText("empty", "is empty")
        kind, suffix = kind_of(name or path)
        with open_bytes(path) as stream:
            head = stream.read(PROBE_BYTES)
        if head.startswith(PARQUET) or (kind == "parquet" and not packing(path)):
            return TextFile(path, "parquet")
        if head.startswith(ARROW) or (kind == "arrow" and not packing(path)):
            return TextFile(path, "arrow")
        skip = _check_head(head, kind)
        file = TextFile(path, kind, skip, "\t" if suffix == ".tsv" else ",")
        if kind == "json" or (kind == "lines" and head[skip:].lstrip().startswith(b"[")):
            with file.open() as stream:
                found, doubt = json_kind(stream, wanted)
            return TextFile(path, found, skip, doubt=doubt) if kind == "json" or found == "array" else file
        if kind == "table" and wanted and not (columns := _header(file)) & set(wanted):
            doubt = f"a table without a column {any_of(wanted)}, but with the columns {keys_of(sorted(columns))}"
            return TextFile(path, "text", skip, doubt=doubt)
        if kind == "text" and _is_json(head[skip:]):
            return TextFile(path, "text", skip, doubt="its lines are JSON objects; to read them as rows, name the file .jsonl")
    return file


def _check_head(head: bytes, kind: str) -> int:
    """Return the length of the byte order mark in bytes. `head`: the first bytes of the file. Raises NotText if these bytes
    show that the file is not text."""
    if not head:
        raise NotText("empty", "is empty")
    if kind in ("parquet", "arrow"):
        raise NotText("binary", f"is a compressed .{kind} file: decompress it")
    for mark, name in OTHER_MARKS:
        if head.startswith(mark) and "\ufffd" not in head[: len(head) // 4 * 4].decode(name, "replace")[:-1]:
            raise NotText("binary", f"is {name} text, not UTF-8: convert it to UTF-8 (iconv -f {name} -t UTF-8)")
    for magic, what in NOT_TEXT:
        if head.startswith(magic):
            raise NotText("binary", f"is {what}")
    if head[257:262] == b"ustar":
        raise NotText("binary", "is a tar archive: unpack it")
    if kind == "text" and b"\0" in head:
        raise NotText("binary", "looks binary (a NUL byte near its start)")
    return len(MARK) if head.startswith(MARK) else 0


def _header(file: TextFile) -> set[str]:
    import csv

    with file.open() as stream:
        line = next(lines_of(stream), None) or b""
    try:
        return set(next(csv.reader([line.decode(errors="replace").rstrip("\r\n")], delimiter=file.separator), []))
    except csv.Error:
        return set()


def _is_json(head: bytes) -> bool:
    """Return whether each complete line of `head`, the first bytes of a file, is a JSON object."""
    *lines, last = head.split(b"\n")
    lines = [line for line in (lines if len(head) == PROBE_BYTES else [*lines, last]) if line.strip()]
    return bool(lines) and all(parse_object(line) is not None for line in lines)


def read_whole(path: str | Path, limit: int = MAX_TEXT_BYTES, may_be_empty: bool = False) -> str:
    """Return the text of a UTF-8 file, without its byte order mark. Independent.

    `may_be_empty`: True to return "" for an empty file, False to raise DataError. Also raises DataError if the file is not
    regular, cannot be read, is not UTF-8, or has more than `limit` bytes.
    """
    with reading(path):
        if not is_regular(path):
            raise DataError(f"{path} is a folder, a pipe or a device, not a regular file. Save the text to a file first")
        with open_bytes(path) as stream:
            data = stream.read(limit + 1)
    if not data and may_be_empty:
        return ""
    try:
        data = data[_check_head(data[:PROBE_BYTES], "text") :]
    except NotText as error:
        raise DataError(f"{path} {error}. A UTF-8 text file is needed") from None
    if len(data) > limit:
        raise DataError(f"{path} has more than {limit:,} bytes of text: it is too large to be read as one text")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is not valid. Convert it to UTF-8") from None

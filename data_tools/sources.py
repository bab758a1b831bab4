"""Where text comes from: files found in a fixed order, read in pieces of bounded size, whatever is wrong with them.

A file is a stream of pieces of text in which None ends a document. Text files are one document each; .jsonl (also .gz
and .zst) has one a line in the field `text`; .parquet one a row in the column `text`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.counts import Counts
from mpidp.errors import DataError, UsageError

PIECE_BYTES = 2**20  # a text file is read, and its document encoded, in pieces of about this size, cut after a newline
BINARY_PROBE_BYTES = 8192
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests"})
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus."""

    name: str  # relative to the source, with "/"
    path: str
    size: int  # bytes


def find_files(source: str, leave_out: Path) -> tuple[list[SourceFile], dict[str, Any]]:
    """The files of a source in their fixed order, and a description for index.json. Independent.

    source: "stdlib", a file or a folder (recursive; hidden names and leave_out are skipped). DataError when it is
    missing, unreadable or holds no file.
    """
    root = Path(sysconfig.get_paths()["stdlib"] if source == "stdlib" else source)
    try:
        if source == "stdlib":
            files = [f for f in _walk(root, leave_out, NOT_STDLIB) if f.name.endswith(".py")]
            sha256 = hashlib.sha256()
            for f in files:
                sha256.update(f.name.encode() + b"\0" + str(f.size).encode() + b"\0" + Path(f.path).read_bytes())
            about: dict[str, Any] = {"kind": "stdlib", "python": sys.version.split()[0], "sha256": sha256.hexdigest()}
        elif root.is_dir():
            files, about = _walk(root, leave_out), {"kind": "folder", "name": root.resolve().name}
        else:
            files = [SourceFile(root.name, str(root), os.stat(root).st_size)]
            about = {"kind": "file", "name": root.name}
    except OSError as error:
        raise DataError(f"cannot read the source {error.filename or source}: {error.strerror}; "
                        "give --source an existing, readable file or folder") from None
    if not files:
        raise DataError(f"the source {root} holds no files; give --source a file or folder with text")
    return files, about | {"files": len(files), "bytes": sum(f.size for f in files)}


def _walk(root: Path, leave_out: Path, skipped: frozenset[str] = frozenset()) -> list[SourceFile]:
    def stop(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, names in os.walk(root, onerror=stop):
        folders[:] = [d for d in folders if not d.startswith(".") and d not in skipped
                      and os.path.realpath(os.path.join(folder, d)) != os.path.realpath(leave_out)]
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith("."):
                found.append(SourceFile(os.path.relpath(path, root).replace(os.sep, "/"), path, os.stat(path).st_size))
    return sorted(found, key=lambda f: os.fsencode(f.name))


@dataclass
class Reader:
    """Reads files into documents and counts what it meets. Independent."""

    bad_utf8: str = "replace"  # or "skip": leave such documents out
    strict: bool = False  # a malformed line is an error
    alone: bool = False  # the source is one file: leaving it out is an error
    counts: Counts = field(default_factory=Counts)

    def pieces(self, file: SourceFile) -> Iterator[str | None]:
        """The text of a file; None ends a document. DataError naming the file when it cannot be read."""
        self.counts.files += 1
        lower = file.name.lower()
        with self.names(file):
            if not os.path.isfile(file.path):
                self.leave_out("binary", file, "is not a regular file")
            elif file.size == 0:
                self.leave_out("empty", file, "is empty")
            elif lower.endswith(LINE_SUFFIXES):
                yield from self._documents(self._lines(file))
            elif lower.endswith(".parquet"):
                yield from self._documents(self._rows(file))
            else:
                yield from self._text(file)

    @contextmanager
    def names(self, file: SourceFile) -> Iterator[None]:
        """What fails inside is a DataError that names the file."""
        try:
            yield
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read {file.path}: {reason}; mend or remove the file") from None

    def leave_out(self, kind: str, file: SourceFile, reason: str) -> None:
        """Count a file that is not read; DataError where it is the whole source."""
        if self.alone:
            raise DataError(f"{file.path} {reason}; give --source a file or folder with text")
        self.counts.note(kind, file.path)

    def _text(self, file: SourceFile) -> Iterator[str | None]:
        with open(file.path, "rb") as stream:
            if b"\0" in stream.read(BINARY_PROBE_BYTES):
                self.leave_out("binary", file, "looks binary (a NUL byte near its start)")
                return
            stream.seek(0)
            bad = False
            if self.bad_utf8 == "skip":
                bad = any(decoded(raw)[1] for raw in _cut(stream))
                stream.seek(0)
            if not bad:
                for raw in _cut(stream):
                    text, replaced = decoded(raw)
                    bad = bad or replaced
                    yield text
                self.counts.documents += 1
                yield None
        if bad:
            self.counts.note("bad_utf8", file.path)

    def _documents(self, found: Iterator[tuple[str, str | bytes | None, str]]) -> Iterator[str | None]:
        """Documents of (place, text or undecodable bytes or None, what is wrong if None)."""
        for place, text, reason in found:
            if text is None:
                if self.strict:
                    raise DataError(f"{place}: {reason}; mend the line, or leave out --strict to skip such lines")
                self.counts.note("malformed", f"{place}: {reason}")
                continue
            if isinstance(text, bytes):
                self.counts.note("bad_utf8", place)
                if self.bad_utf8 == "skip":
                    continue
                text = text.decode(errors="replace")
            if not text:
                self.counts.note("empty", place)
                continue
            self.counts.documents += 1
            yield text
            yield None

    def _lines(self, file: SourceFile) -> Iterator[tuple[str, str | bytes | None, str]]:
        for number, line in enumerate(raw_lines(file), 1):
            if line.strip():
                yield (f"{file.path}:{number}", *_text_of_line(line))

    def _rows(self, file: SourceFile) -> Iterator[tuple[str, str | bytes | None, str]]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UsageError(f"{file.path}: reading .parquet needs pyarrow: pip install 'mpidp[data]'") from None
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(file.path) as table:
                if "text" not in table.schema_arrow.names:
                    names = ", ".join(table.schema_arrow.names)
                    raise DataError(f"{file.path} has no column `text`, only {names}; rename one")
                for batch in table.iter_batches(batch_size=256, columns=["text"]):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        text = value if isinstance(value, str) else None
                        yield f"{file.path}: row {number}", text, "`text` is not a string"
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{file.path} is not a readable parquet file ({error}); mend or remove it") from None


def _cut(stream: BinaryIO) -> Iterator[bytes]:
    """Pieces of about PIECE_BYTES that end after a newline where there is one, else between two characters."""
    rest = b""
    while data := stream.read(PIECE_BYTES):
        data = rest + data
        end = data.rfind(b"\n") + 1
        if not end:
            end = len(data)
            while end > len(data) - 4 and end > 1 and data[end - 1] & 0xC0 == 0x80:  # bytes inside a character
                end -= 1
            end -= 1  # and its first byte
        rest = data[end:]
        if end:
            yield data[:end]
    if rest:
        yield rest


def decoded(raw: bytes) -> tuple[str, bool]:
    """(text, whether something had to be replaced). Pure."""
    try:
        return raw.decode(), False
    except UnicodeDecodeError:
        return raw.decode(errors="replace"), True


def _text_of_line(line: bytes) -> tuple[str | bytes | None, str]:
    """The text of a JSON line; bytes when not all is UTF-8 (lone surrogates too); None and why when malformed."""
    text, replaced = decoded(line)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, f"not valid JSON ({error})"
    found = value.get("text") if isinstance(value, dict) else None
    if not isinstance(found, str):
        return None, "no field `text` that is a string"
    try:
        encoded = found.encode()
    except UnicodeEncodeError:
        return found.encode(errors="surrogatepass"), ""
    return (encoded if replaced else found), ""


def raw_lines(file: SourceFile) -> Iterator[bytes]:
    """The lines of a .jsonl, plain or packed. UsageError without the library that unpacks. Independent."""
    lower = file.name.lower()
    if lower.endswith(".zst"):
        yield from _split_lines(_zst_chunks(file))
    elif lower.endswith(".gz"):
        with gzip.open(file.path, "rb") as packed:
            yield from packed
    else:
        with open(file.path, "rb") as plain:
            yield from plain


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _zst_chunks(file: SourceFile) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise UsageError(f"{file.path}: reading .zst needs zstandard: pip install 'mpidp[data]'") from None
    with open(file.path, "rb") as packed:
        frame = None
        while data := packed.read(BINARY_PROBE_BYTES):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise OSError(f"damaged zstandard data ({error})") from None
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:  # the library's own reader passes over this in silence
            raise OSError("the compressed data ends too early")

"""Find the files of a source in a fixed order and read them in pieces of bounded size. Bad input is counted and skipped.

A file is read as a stream of pieces of text, in which None ends a document. A text file is one document. A .jsonl file (also .gz
and .zst) has one document per line, in the field `text`. A .parquet file has one document per row, in the column `text`.
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

PIECE_BYTES = 2**20  # approximate size of the pieces in which a text file is read and encoded; each ends after a newline
BINARY_PROBE_BYTES = 8192  # a NUL byte among the first bytes marks a binary file
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests"})
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class SourceFile:
    """A file of a source."""

    name: str  # relative to the source, with "/"
    path: str
    size: int  # in bytes


def find_files(source: str, leave_out: Path) -> tuple[list[SourceFile], dict[str, Any]]:
    """Return the files of a source in a fixed order, and a description of the source for index.json. Independent.

    source: "stdlib", a file or a folder (recursive; hidden files and leave_out are skipped). Raises DataError if
    the source is missing, unreadable or empty.
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
class SourceReader:
    """Reads files into documents and counts problems. Independent."""

    bad_utf8: str = "replace"  # or "skip": skip documents with invalid UTF-8
    strict: bool = False  # whether a malformed line raises DataError
    alone: bool = False  # whether the source is a single file: skipping it is then an error
    counts: Counts = field(default_factory=Counts)

    def pieces(self, file: SourceFile) -> Iterator[str | None]:
        """Yield the text of a file. None ends a document. Raises DataError, which names the file, if it cannot be read."""
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
        """Convert read errors into a DataError that names the file."""
        try:
            yield
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read {file.path}: {reason}; replace or remove the file") from None

    def leave_out(self, kind: str, file: SourceFile, reason: str) -> None:
        """Count a skipped file. Raises DataError if it is the whole source."""
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
        """Yield the documents of `found`: (place, text, reason), where text is bytes if it is not valid Unicode.

        text is None if the document is malformed; reason then describes the problem.
        """
        for place, text, reason in found:
            if text is None:
                if self.strict:
                    raise DataError(f"{place}: {reason}; correct the line, or omit --strict to skip such lines")
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
                    raise DataError(f"{file.path} has no column `text`, only {names}; rename one of them to `text`")
                for batch in table.iter_batches(batch_size=256, columns=["text"]):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        text = value if isinstance(value, str) else None
                        yield f"{file.path}: row {number}", text, "`text` is not a string"
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{file.path} is not a readable parquet file ({error}); replace or remove it") from None


def _cut(stream: BinaryIO) -> Iterator[bytes]:
    """Yield pieces of about PIECE_BYTES. A piece ends after a newline if it has one, else between two characters."""
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


def decoded(raw: bytes) -> tuple[str, bool]:
    """Return (text, whether invalid bytes were replaced). Pure."""
    try:
        return raw.decode(), False
    except UnicodeDecodeError:
        return raw.decode(errors="replace"), True


def _text_of_line(line: bytes) -> tuple[str | bytes | None, str]:
    """Return (text, "") of a JSON line. text is bytes if not valid Unicode. Returns (None, reason) if the line is malformed."""
    text, replaced = decoded(line)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, f"not valid JSON ({error})"
    found = value.get("text") if isinstance(value, dict) else None
    if not isinstance(found, str):
        return None, "no string field `text`"
    try:
        encoded = found.encode()
    except UnicodeEncodeError:
        return found.encode(errors="surrogatepass"), ""
    return (encoded if replaced else found), ""


def raw_lines(file: SourceFile) -> Iterator[bytes]:
    """Yield the lines of a .jsonl file, plain or compressed. Raises UsageError if the decompressor is missing. Independent."""
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
        if frame is not None:  # zstandard's own reader does not report this
            raise OSError("the compressed data ends too early")

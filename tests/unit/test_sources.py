"""Laws of reading sources: every format gives its documents, and damage is reported, counted or rejected."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data_tools import sources
from data_tools.counts import Counts
from data_tools.files import SourceFile
from data_tools.sources import SourceReader
from mpidp.errors import DataError

TEXTS = ["first", "sécond\nwith two lines", "third " * 1000] * 20
ARCHIVES = [".jsonl.gz", ".jsonl.zst", ".parquet"]


def read(path: Path, **options: Any) -> tuple[list[str], Counts]:
    """Return the documents of a file and the counts."""
    reader, found, under_way = SourceReader(**options), [], ""
    for piece in reader.pieces(SourceFile(path.name, str(path), path.stat().st_size)):
        under_way += piece or ""
        if piece is None:
            found.append(under_way)
            under_way = ""
    assert not under_way and len(found) == reader.counts.documents
    return found, reader.counts


def write(path: Path) -> None:
    """Write TEXTS in the format given by the file name."""
    lines = "".join(json.dumps({"text": text, "other": 1}) + "\n\n" for text in TEXTS).encode()
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": TEXTS, "n": range(60)}), path, row_group_size=7)
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        path.write_bytes(b"".join(zstandard.compress(part) for part in (lines[:1000], lines[1000:])))
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


@pytest.mark.parametrize("suffix", [".jsonl", *ARCHIVES])
def test_documents_of_every_format(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"data{suffix}")
    assert read(tmp_path / f"data{suffix}") == (TEXTS, Counts(files=1, documents=60))


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize("damage", ["cut", "flip", "text"])
def test_damaged_archives_are_refused_by_name(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"data{suffix}"
    write(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes({"cut": path.read_bytes()[: len(data) * 2 // 3], "flip": bytes(data), "text": b"hello\n" * 9}[damage])
    with pytest.raises(DataError, match=path.name):
        read(path)


def test_rows_without_a_text(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None, "", "b"]}), tmp_path / "a.parquet")
    found, counts = read(tmp_path / "a.parquet")
    assert found == ["a", "b"] and (counts.malformed, counts.empty) == (1, 1)
    parquet.write_table(pyarrow.table({"words": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="b.parquet has no column `text`, only words"):
        read(tmp_path / "b.parquet")


BAD_LINES = [b"{", b"[]", b'{"text": 5}', b'{"other": "x"}', b'"text"', b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_malformed_lines_are_counted_with_their_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": ""}\n{"text": "last"}')
    found, counts = read(path)
    assert found == ["fine", "last"] and (counts.malformed, counts.empty) == (1, 1)
    assert f"{path}:3: " in counts.problems["malformed"][0]
    with pytest.raises(DataError, match=r"a\.jsonl:3"):
        read(path, strict=True)


def test_long_files_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"lines": "zwölf Boxkämpfer 🥊\n" * 3000, "one": "漢字é🙂x" * 9000, "end": "\n" * 5000 + "é" * 9000}
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)
    for name, text in texts.items():
        path = tmp_path / name
        path.write_bytes(text.encode())
        assert read(path) == ([text], Counts(files=1, documents=1))
        pieces = SourceReader().pieces(SourceFile(name, str(path), 1))
        assert max(len((piece or "").encode()) for piece in pieces) < 2010


def test_bytes_that_are_not_utf8_anywhere_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 10)
    for bad in (b"\xff", b"\xe6\xbc", b"\x80" * 30, b"\xf0\x9f\x99"):
        for text in (bad, b"abc" * 20 + bad, bad + b"def\n" * 20, b"line\n" * 9 + bad + b"\nline"):
            (tmp_path / "a").write_bytes(text)
            found, counts = read(tmp_path / "a")
            assert counts.bad_utf8 == 1 and "\ufffd" in found[0]
            assert found[0].replace("\ufffd", "") == text.replace(bad, b"").decode()
            assert read(tmp_path / "a", bad_utf8="skip")[0] == []

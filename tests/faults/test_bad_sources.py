"""Bad input to `data_tools.prepare`: bad text is counted or rejected, and existing shards stay intact.

| fault | expected | checked |
|---|---|---|
| the source missing, empty, an empty folder, a dangling link, binary, a special file | 3 | code, output, OUT not created |
| not UTF-8: replaced or left out | 0, counted; 3 if nothing remains | output, index.json, verify |
| binary and empty files among valid ones | 0, counted | index.json |
| malformed .jsonl: left out and counted; with --strict rejected | 0; 3 with file and line | output, index.json |
| truncated .jsonl.gz, invalid parquet | 3, the file | output |
| tokenizer unknown; tokenizer.json malformed, not for bytes, without end of document | 2; 3 | output |
| invalid options | 2 | output |
| OUT contains foreign .h5 files or a foreign index, is a file, is below a file | 2, nothing changed | bytes of OUT |
| any failure when shards exist | the shards are unchanged and can be trained on | bytes of OUT |
| one rank of two reads the bad file | 3, reported once | code of both mpiruns |
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.commands import Ended, Forks, Shell, expect

GOOD = "a line of good text\n" * 40


def prepare(place: Path, forks: Forks, *words: object) -> Ended:
    """Prepare `source` in place into `out`."""
    return forks.run(place, "data_tools.prepare", "--source", "source", "--out", "out", *words)


def about(place: Path) -> dict[str, Any]:
    """Return index.json's entry about the source."""
    found: dict[str, Any] = json.loads((place / "out" / "index.json").read_text())["source"]
    return found


BAD_SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: None, "the source source cannot be read (No such file or directory)"),
    "of no bytes": (Path.touch, "source is empty"),
    "an empty folder": (Path.mkdir, "the source source holds no files"),
    "a dangling link": (lambda p: p.symlink_to("nowhere"), "the source source cannot be read"),
    "a folder with a dangling link": (lambda p: (p.mkdir(), (p / "x").symlink_to("gone")), "the source source/x cannot be read"),
    "a folder with an unreadable file": (lambda p: (p.mkdir(), (p / "x").symlink_to("x")), "the source source/x cannot be read"),
    "binary": (lambda p: p.write_bytes(b"\x7fELF\0\0" + bytes(range(256)) * 9), "source looks binary"),
    "a folder of binaries": (lambda p: (p.mkdir(), (p / "x").write_bytes(bytes(99))), "the source has no text at all"),
    "a folder of empty files": (lambda p: (p.mkdir(), (p / "x").touch()), "the source has no text at all"),
    "special": (lambda p: p.symlink_to("/dev/null"), "source is a folder, a pipe or a device, not a regular file"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_source_without_text(tmp_path: Path, forks: Forks, name: str) -> None:
    make, phrase = BAD_SOURCES[name]
    make(tmp_path / "source")
    expect(prepare(tmp_path, forks), 3, phrase)
    assert not (tmp_path / "out").exists()


def test_text_that_is_not_utf8(tmp_path: Path, forks: Forks) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good.txt").write_text(GOOD)
    (source / "latin.txt").write_bytes("Käse, süß\n".encode("latin-1") * 9)
    for choice, documents in (("replace", 2), ("skip", 1)):
        ended = prepare(tmp_path, forks, "--bad-utf8", choice)
        expect(ended, 0)
        assert "1 document with invalid UTF-8: source/latin.txt" in ended.out, ended
        assert f"shards with {documents} document" in ended.out and about(tmp_path)["bad_utf8"] == 1, ended
        expect(forks.run(tmp_path, "data_tools.verify", "out"), 0)


def test_nothing_but_text_that_is_not_utf8(tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "source").write_bytes(b"\xff\xfe\xfd" * 50)
    expect(prepare(tmp_path, forks, "--bad-utf8", "skip"), 3, "the source has no text at all")
    expect(prepare(tmp_path, forks, "--bad-utf8", "replace"), 0)


def test_binary_and_empty_files_among_good_ones(tmp_path: Path, forks: Forks) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good.txt").write_text(GOOD)
    (source / "program").write_bytes(b"\x7fELF\0" + bytes(50))
    (source / "nothing.txt").touch()
    ended = prepare(tmp_path, forks)
    expect(ended, 0)
    assert "1 binary or special file skipped: source/program" in ended.out, ended
    assert (about(tmp_path)["binary"], about(tmp_path)["empty"]) == (1, 1)


MALFORMED = ['{"text": "cut', "[]", '{"text": 3}', '{"words": "x"}', '{"text": null}', "[" * 100_000, "\0"]


def test_malformed_jsonl(tmp_path: Path, forks: Forks) -> None:
    source = tmp_path / "source"
    source.mkdir()
    lines = [json.dumps({"text": GOOD}), *MALFORMED, json.dumps({"text": "lone \ud800 surrogate"})]
    (source / "text.jsonl").write_text("\n".join(lines))
    ended = prepare(tmp_path, forks)
    expect(ended, 0)
    assert f"{len(MALFORMED)} malformed lines or rows skipped: source/text.jsonl:2: not valid JSON" in ended.out, ended
    assert (about(tmp_path)["malformed"], about(tmp_path)["bad_utf8"]) == (len(MALFORMED), 1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    expect(prepare(tmp_path, forks, "--strict"), 3, "source/text.jsonl:2: not valid JSON", "omit --strict")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-20]), ("a.jsonl.gz", b"no gzip"), ("a.jsonl.zst", b"no zst"),
    ("a.parquet", b"PAR1 no"), ("a.parquet", b"PAR1"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_packed_sources_that_cannot_be_read(tmp_path: Path, forks: Forks, name: str, content: bytes) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_bytes(content)
    expect(prepare(tmp_path, forks), 3, f"source/{name}")
    assert not (tmp_path / "out").exists()


WRONG = {
    "tokenizer": (["--tokenizer", "absent"], 2, "--tokenizer 'absent' must be 'byte', 'char', 'bpe:VOCAB'"),
    "vocabulary no number": (["--tokenizer", "bpe:many"], 2, "bpe:many"),
    "vocabulary too small": (["--tokenizer", "bpe:3"], 2, "bpe:3"),
    "shards": (["--shards", "0"], 2, "--shards 0 must be at least 1"),
    "no number": (["--shards", "four"], 2, "--shards: invalid int value: 'four'"),
    "fraction": (["--val-fraction", "1.5"], 2, "--val-fraction 1.5 must be at least 0 and below 1"),
    "not a number": (["--val-fraction", "nan"], 2, "--val-fraction nan must be at least 0 and below 1"),
    "split": (["--split", "words"], 2, "--split 'words' must be 'text' or 'document'"),
    "bad utf8": (["--bad-utf8", "drop"], 2, "--bad-utf8 'drop' must be 'replace' or 'skip'"),
    "out is a file": (["--out", "source"], 2, "source is not a folder"),
    "out under a file": (["--out", "source/out"], 2, "out=source/out cannot be written to"),
    "out in proc": (["--out", "/proc/out"], 2, "out=/proc/out cannot be written to"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(tmp_path: Path, forks: Forks, name: str) -> None:
    words, code, phrase = WRONG[name]
    (tmp_path / "source").write_text(GOOD)
    expect(prepare(tmp_path, forks, *words), code, phrase)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff", b"[]", b"{}", b'{"kind": "unknown"}', b'{"version": "1.0", "model": {"type": "BPE"}}',
], ids=["of no bytes", "cut", "not text", "a list", "an empty table", "another kind", "half a tokenizer"])
def test_a_given_tokenizer_that_is_none(tmp_path: Path, forks: Forks, content: bytes) -> None:
    (tmp_path / "source").write_text(GOOD)
    (tmp_path / "tokenizer.json").write_bytes(content)
    expect(prepare(tmp_path, forks, "--tokenizer", "tokenizer.json"), 3, "tokenizer.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("foreign", ["mine.h5", "train_00000.h5", "index.json"])
def test_out_holds_files_of_others(tmp_path: Path, forks: Forks, foreign: str) -> None:
    (tmp_path / "source").write_text(GOOD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / foreign).write_bytes(b"precious")
    expect(prepare(tmp_path, forks), 2, "--out out holds", "Choose another folder")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {foreign: b"precious"}


def test_one_rank_meets_the_bad_file(either: Shell) -> None:
    source = either.folder / "source"
    source.mkdir()
    (source / "a.txt").write_text(GOOD * 50)
    (source / "b.jsonl").write_text(json.dumps({"text": GOOD * 50}) + "\n{\n")
    before = {path.name: path.read_bytes() for path in (either.folder / "shards").iterdir()}
    words = ("-m", "data_tools.prepare", "--source", "source", "--out", "shards", "--strict")
    ended = either.run(*words, ranks=2)
    expect(ended, 3, "rank 1: source/b.jsonl:2: not valid JSON")
    assert {path.name: path.read_bytes() for path in (either.folder / "shards").iterdir()} == before

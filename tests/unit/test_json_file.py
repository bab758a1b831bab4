"""The reader of JSON files: what fits a schema, and what is refused with its place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NotRequired, Required, TypedDict

import pytest

from mpidp.runtime.files import open_regular, write_file
from mpidp.runtime.json_file import MAX_DEPTH, parse_json, read_json, read_json_lines


class Inner(TypedDict):
    name: str
    size: NotRequired[int]


class Outer(TypedDict, total=False):
    step: Required[int]
    loss: float | None
    rows: list[list[int]]
    nodes: dict[str, int]
    inner: Inner
    any: Any


FITS = [
    '{"step": 1}', '{"step": 1, "loss": 2, "other": [{}]}', '{"step": 1, "loss": null, "rows": [], "nodes": {}}',
    '{"step": 1, "rows": [[1], [2, 3]], "nodes": {"a": 1}, "inner": {"name": "x"}}', '{"step": -1, "any": "\\ud83d\\ude00"}',
]
REFUSED = {
    "{}": "step is missing",
    "[]": "the content is a list, but must be an object",
    '{"step": true}': "step is true, but must be an integer",
    '{"step": 1.0}': "step is 1.0, but must be an integer",
    '{"step": 9223372036854775808}': "step is 9223372036854775808, but must be an integer",
    '{"step": 1, "loss": NaN}': "loss is NaN, but must be a number or null",
    '{"step": 1, "loss": "low"}': 'loss is "low", but must be a number or null',
    '{"step": 1, "rows": [[1], [2, "3"]]}': r'rows\[1\]\[1\] is "3", but must be an integer',
    '{"step": 1, "rows": [1]}': r"rows\[0\] is 1, but must be a list",
    '{"step": 1, "nodes": {"a": null}}': "nodes.a is null, but must be an integer",
    '{"step": 1, "inner": {}}': "inner.name is missing",
    '{"step": 1, "inner": {"name": "x", "size": "y"}}': "inner.size",
    '{"step": 1, "any": "\\ud83d"}': "half of a surrogate pair",
    '{"step": 1, "any": ' + "[" * 100_000: "nested too deeply",
    '{"step": 1, "any": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}": f"nested more than {MAX_DEPTH} deep",
    '{"step": 1' + "0" * 5000 + "}": "integer string conversion",
    '{"step": 1,}': "Expecting property name|Illegal trailing comma",
    "": "Expecting value",
}


@pytest.mark.parametrize("text", FITS)
def test_what_fits_is_returned(text: str) -> None:
    assert parse_json(text, Outer) == json.loads(text)


@pytest.mark.parametrize("text", REFUSED)
def test_what_does_not_fit_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[text]):
        parse_json(text, Outer)


def test_bytes_that_are_not_utf8() -> None:
    with pytest.raises(ValueError, match="not UTF-8 .* at byte 1"):
        parse_json(b'"\xff"')


def test_damaged_lines_are_counted_except_an_incomplete_last_one(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"step": 1}\nnot JSON\n\n{"step": "2"}\n\xff\n{"step": 3}\n{"st')
    assert read_json_lines(path, Outer) == ([{"step": 1}, {"step": 3}], 3)
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert read_json_lines(path, Outer) == ([{"step": 1}, {"step": 2}], 0)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, problem in (("fifo", "not a regular file"), (".", "Is a directory"), ("/dev/zero", "not a regular file")):
        with pytest.raises(OSError, match=problem):
            open_regular(tmp_path / name)
        with pytest.raises(OSError, match=problem):
            read_json(tmp_path / name)
    (tmp_path / "large").write_text("1" * 100)
    with pytest.raises(ValueError, match="larger than 99 bytes"):
        read_json(tmp_path / "large", int, max_bytes=99)


def test_a_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    """Nobody can foresee the name of the temporary file, and a link with the final name is replaced."""
    (tmp_path / "theirs").write_text("keep")
    for name in (".mine.tmp", "mine"):
        (tmp_path / name).symlink_to(tmp_path / "theirs")
    write_file(tmp_path / "mine", "new")
    assert (tmp_path / "theirs").read_text() == "keep" and (tmp_path / "mine").read_text() == "new"
    assert not (tmp_path / "mine").is_symlink()
    before = sorted(os.listdir(tmp_path))

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "a long message of a library")

    with pytest.raises(OSError, match="No space left on device: .*mine"):
        write_file(tmp_path / "mine", fails)
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "mine").read_text() == "new"

"""Every source file, class and function named in the documentation exists. docs/decisions.md is history: it names files as they
were at the time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALL = {path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))}
PAGES = sorted(ALL - {"docs/decisions.md"})
FOLDERS = "mpidp|data_tools|tests|benchmarks|examples|jobs|docs"
FILE = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\.(?:py|sh|sbatch|toml|def|md|png)\b")
NAME = re.compile(r"`(mpidp/[\w/]+\.py)`\s\((?:\w+\.)?(\w+)\)")  # as in `mpidp/parallel/engine.py` (Engine.evaluate)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    named = set(FILE.findall((ROOT / page).read_text()))
    assert not sorted(name for name in named if not (ROOT / name).exists())


def test_every_class_and_function_is_in_the_file_that_is_named() -> None:
    named = NAME.findall((ROOT / "docs/equations.md").read_text())
    assert len(named) > 3
    for file, name in named:
        assert re.search(rf"^ *(?:def|class) {name}\b", (ROOT / file).read_text(), re.M), (file, name)

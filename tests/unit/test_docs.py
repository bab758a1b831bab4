"""Every source file named in the documentation exists. docs/decisions.md is history: it names files as they were at the time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))]
FOLDERS = "mpidp|data_tools|tests|benchmarks|examples|jobs|docs"
FILE = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\.(?:py|sh|sbatch|toml|def|md|png)\b")


@pytest.mark.parametrize("page", sorted({*PAGES} - {"docs/decisions.md"}))
def test_every_file_that_a_page_names_exists(page: str) -> None:
    named = set(FILE.findall((ROOT / page).read_text()))
    assert not sorted(name for name in named if not (ROOT / name).exists())

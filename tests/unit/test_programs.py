"""Every name that the examples, benchmarks and tests import from this project exists, also where a function imports it."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("examples", "benchmarks", "tests")
PROGRAMS = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_imports_exist(program: str) -> None:
    for node in ast.walk(ast.parse((ROOT / program).read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(("mpidp.", "data_tools.")):
                    importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("mpidp", "data_tools"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")

"""Hugging Face Accelerate over backend mpi4py, without patches: runs examples/accelerate_ddp.py as a user starts it."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.faults.commands import ROOT, Shell


@pytest.mark.parametrize("ranks", [2])
def test_accelerate_trains_over_mpi(place: Path, ranks: int) -> None:
    if missing := [name for name in ("accelerate", "sklearn") if find_spec(name) is None]:
        pytest.skip(f"SKIPPED FOR LACK OF {' and '.join(missing)}: a test extra")
    ended = Shell(place).run("-m", "mpi4py", ROOT / "examples/accelerate_ddp.py", ranks=ranks)
    assert ended.code == 0, ended
    found = re.search(rf"(\d+) of 297 held-out digits are right on {ranks} ranks over mpi4py, .*, replicas equal", ended.out)
    assert found and int(found[1]) > 230, ended

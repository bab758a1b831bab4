"""How benchmarks/tokens.py evaluates runs: losses at given numbers of tokens, and the comparison with synchronous."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from tokens import BASE, NAMES, loss_at, table  # noqa: E402

RUN = {"curve": [(100, 3.0), (200, 2.0)], "bytes": 4000.0, "seconds": 1.0}


def test_a_loss_before_the_first_evaluation_or_after_the_last_is_not_known() -> None:
    assert loss_at(RUN, 150) == 2.5 and loss_at(RUN, 200) == 2.0
    assert math.isnan(loss_at(RUN, 99)) and math.isnan(loss_at(RUN, 201))


def test_the_table_compares_runs_of_the_same_seed(capsys: pytest.CaptureFixture[str]) -> None:
    late = {"curve": [(200, 2.02)], "bytes": 4.0, "seconds": 1.0}
    later, none = {**late, "curve": [(200, 2.06)]}, {"problem": "rejected: reason"}
    table({BASE: [RUN, RUN], "late": [late, later], "none": [none]}, [100, 200])
    lines = capsys.readouterr().out.splitlines()
    assert "| late | - | 2.040 ±0.020 | 2.00 ±1.00 | 4 | 1/1,000 | 1 ±0 |" in lines
    assert any(line.startswith("| none | rejected: reason |") for line in lines)
    assert len({line.count("|") for line in lines if line}) == 1


def test_servers_are_not_compared() -> None:
    assert BASE in NAMES and not any(name.startswith("server") for name in NAMES)

"""How benchmarks/network.py evaluates the lines of a run: curves, budgets and targets. The link is checked when it is created."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from network import METHODS, Watch, at, rejection, seconds_to  # noqa: E402

LINES = [
    {"event": "start", "step": 0}, {"step": 1, "tokens": 10, "step_seconds": 1.0}, {"step": 2, "tokens": 20, "step_seconds": 3.0},
    {"step": 2, "val_loss": 3.0, "val_tokens": 8}, {"step": 3, "tokens": 30, "step_seconds": 4.0},
    {"step": 3, "val_loss": 2.0, "val_tokens": 8}, {"step": 3, "val_loss": None, "val_tokens": 8},
]


def test_a_curve_grows_with_the_file_without_incomplete_lines(tmp_path: Path) -> None:
    watch, text = Watch(tmp_path / "metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in LINES)
    watch.poll()
    for end in range(len(text) + 1):
        (tmp_path / "metrics.jsonl").write_text(text[:end])
        watch.poll()
    assert watch.curve == [(4.0, 20, 3.0), (8.0, 30, 2.0), (8.0, 30, math.inf)]
    assert watch.seconds == 8.0 and len(watch.steps) == 3


def test_losses_and_moments_lie_on_straight_lines_between_evaluations() -> None:
    curve = [(4.0, 20, 3.0), (8.0, 30, 2.0), (12.0, 40, 2.5), (16.0, 50, 1.0)]
    assert at(curve, 0, 6.0) == 2.5 and at(curve, 1, 25) == 2.5 and at(curve, 0, 99.0) == 1.0
    assert seconds_to(curve, 2.5) == 6.0 and seconds_to(curve, 5.0) == 4.0 and seconds_to(curve, 1.75) == 14.0
    assert seconds_to(curve, 0.5) == math.inf
    assert seconds_to([(1.0, 1, math.inf), (2.0, 2, 1.0)], 1.5) == 2.0


@pytest.mark.parametrize(("settings", "words"), [
    (METHODS["synchronous"], ""), (["--comm.no_such=1"], "not supported"), (["--strategy.name=no_such"], "not supported"),
    (["--model.num_heads=3"], "rejected: the head size, model.model_dim"),
])
def test_unsupported_settings_are_reported(settings: list[str], words: str) -> None:
    reason = rejection(settings)
    assert reason.startswith(words) and bool(reason) == bool(words)

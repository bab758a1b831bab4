"""Without equal bits, a replay accepts the rounding of the optimizer, and reports larger differences."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpidp.checkpoint import resume
from mpidp.training.replayer import CLOSE, CLOSE_MUON, Replay

WEIGHT, ROWS = "model/blocks.0.attention.q.weight", "strategy/second_momentum_buffer"


@pytest.mark.parametrize(("close", "name", "gap", "accepted"), [
    (CLOSE, WEIGHT, 5e-6, True), (CLOSE, WEIGHT, 2e-5, False),
    (CLOSE_MUON, WEIGHT, 5e-4, True), (CLOSE_MUON, WEIGHT, 5e-3, False),
    (CLOSE_MUON, ROWS, 1e-2, True), (CLOSE_MUON, ROWS, 5e-2, False),
])
@pytest.mark.parametrize("loose", [True, False])
def test_a_difference_is_accepted_up_to_the_bound_of_its_tensor(
    monkeypatch: pytest.MonkeyPatch, loose: bool, close: float, name: str, gap: float, accepted: bool
) -> None:
    then = torch.ones(64)
    monkeypatch.setattr(resume, "open_run", lambda path, comm: {name: then})
    replay: Any = SimpleNamespace(
        loose=["mesh.tp"] if loose else [], close=close, job=SimpleNamespace(comm=None), tensors=lambda: {name: then * (1 + gap)}
    )
    assert Replay._compare_tensors(replay, Path("step_00000010"))[0] == (loose and accepted)

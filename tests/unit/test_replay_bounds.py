"""Without equal bits, a replay accepts the rounding of the optimizer, and reports larger differences. It names steps that
cannot be replayed or compared."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpidp.checkpoint import resume
from mpidp.errors import UsageError
from mpidp.replay import against
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


def test_runs_without_a_common_step_are_not_the_same(tmp_path: Path) -> None:
    """--step 0 is not the default of --step: this step does not exist."""
    for name, steps in (("a", (1, 2)), ("b", (3, 4)), ("c", (2, 3))):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "train_loss": 1.0 / step, "grad_norm": 1.0, "lr": 0.1} for step in steps]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    a, b, c = (str(tmp_path / name) for name in "abc")
    found = against(Namespace(run=a, against=b, step=None), MPI.COMM_SELF)
    assert not found["same"] and found["verdict"] == f"{a} and {b} have no recorded step in common"
    found = against(Namespace(run=a, against=c, step=None), MPI.COMM_SELF)
    assert found["same"] and found["verdict"] == f"{a} and {c} are the same up to step 2, the last in both records"
    with pytest.raises(UsageError, match="step 0 cannot be replayed. Give --step from 1 to 2"):
        against(Namespace(run=a, against=c, step=0), MPI.COMM_SELF)

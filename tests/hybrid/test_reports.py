"""Law: for any kind of run the phases of a step add up to its time, and the parts of the report to the run's time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mpidp.metrics.jsonl import number
from mpidp.report.__main__ import named, report
from mpidp.report.read import read
from mpidp.report.waterfall import waterfall
from tests.tiny import WORLD, corpus, everywhere, tiny, train_at

pytestmark = pytest.mark.mpi
PHASES = ("data", "compute", "comm_wait", "update")
CLOCKS = 0.01  # seconds by which two clocks of a run may differ

RUNS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {  # ranks, sections
    "stages that come twice": (2, {"model": {"num_layers": 4}, "mesh": {"pp": 2, "interleave": 2}}),
    "positions shared out": (2, {"mesh": {"tp": 2, "sequence": True}}),
    "both": (4, {"model": {"num_layers": 4}, "mesh": {"pp": 2, "tp": 2, "interleave": 2, "sequence": True}}),
    "local": (2, {"strategy": {"name": "local", "sync_every": 2, "meet_every": 2}}),
    "server": (3, {"strategy": {"name": "server"}}),
    "adapters": (2, {"model": {"lora_rank": 2}}),
    "lstm": (2, {"model": {"kind": "lstm", "num_heads": 4, "hidden_dim": 0}}),
}


def adds_up(run: Path) -> str:
    """Return the times that do not add up; empty if all do. Independent."""
    found = read(run)
    for line in found.steps:
        phases = [number(line, f"{phase}_seconds") or 0.0 for phase in PHASES]
        if min(phases) < 0 or sum(phases) > line["step_seconds"] + CLOCKS:
            return f"step {line['step']}: {dict(zip(PHASES, phases, strict=True))} of {line['step_seconds']}"
    whole, worked = waterfall(found).whole, found.seconds()
    return "" if abs(whole - worked) < CLOCKS * len(found.lines) else f"parts {whole}, run {worked}"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_adds_up(shared_folder: Path, shared_tmp: Path, name: str) -> None:
    ranks, sections = RUNS[name]
    if ranks > WORLD.size:
        pytest.skip("more ranks than there are")
    config = tiny(corpus(shared_folder), shared_tmp / "run", metrics={"timeline": "2:4"}, **sections,
                  train={"steps": 6, "save_every": 2, "eval_every": 4})
    train_at(ranks, config)
    if WORLD.rank == 0:  # as if the run had been killed after step 5
        for step in (5, 6):
            shutil.rmtree(shared_tmp / f"run/checkpoints/step_{step:08d}", ignore_errors=True)
    WORLD.barrier()
    assert train_at(ranks, config).end["step"] == 6
    wrong, said = "", ""
    if WORLD.rank == 0:
        wrong, said = adds_up(shared_tmp / "run"), report(named([read(shared_tmp / "run")]))
    everywhere(not wrong, f"phases add up ({wrong})")
    everywhere(WORLD.rank > 0 or "repeated after a restart" in said, "the report tells what was lost")
    names = {event["name"] for event in json.loads((shared_tmp / "run/timeline.json").read_text())["traceEvents"]}
    assert {"forward", "backward", "update"} <= names

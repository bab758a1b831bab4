"""`python -m mpidp.plan methods` as a command.

| fault | expected | checked |
|---|---|---|
| none, --run under either mpirun | 0, each method tried or rejected, nothing left behind | JSON, the folder's listing |
| none, one process | 0, a table; the folder unchanged | stdout, the folder's listing |
| no cluster.json, one process | 2, a message naming the doctor and --link | code, one line |
| an unknown setting under mpirun | 2, reported once | code, one line |
| --ranks different from the launch, more ranks than lanes | 2, what to change | code, one line |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpidp.plan.methods.predict import METHODS
from tests.faults.commands import Ended, Shell, expect

PLAN = ("-m", "mpidp.plan", "methods", "tiny.toml")


def listing(folder: Path) -> list[str]:
    """List all files except those written by the tests' shells."""
    found = (str(p.relative_to(folder)) for p in folder.rglob("*"))
    return sorted(name for name in found if not name.startswith((".out_", ".err_", "tmp")))


def answer(ended: Ended) -> dict[str, Any]:
    """Return the parsed output of --json."""
    assert ended.code == 0, ended
    found: dict[str, Any] = json.loads(ended.out)
    return found


def judge(found: dict[str, Any], names: list[str]) -> None:
    assert [row["method"] for row in found["rows"]] == names and found["ranks"] == 2
    for row in found["rows"]:
        assert not row["refused"] and row["loss"] > 0 and row["step_seconds"] > 0, row
        assert found["curves"][row["method"]][-1][0] == found["took_seconds"][row["method"]]
    assert found["loss_name"] == "val_loss" and found["why"].startswith(found["recommended"])


def test_every_method_is_really_trained(shell: Shell) -> None:
    before = listing(shell.folder)
    found = answer(shell.run(*PLAN, "--run", 1, "--json", ranks=2, seconds=400))
    judge(found, list(METHODS))
    assert listing(shell.folder) == before


def test_under_either_mpi(either: Shell) -> None:
    before = listing(either.folder)
    words = ("--methods", "topk,local-overlap,server-async", "--run=0.2", "--json", "--comm.transport=messages")
    found = answer(either.run(*PLAN, *words, ranks=2, seconds=200))
    judge(found, ["synchronous", "topk", "local-overlap", "server-async"])
    foretold = {row["method"]: row["sent_bytes"] for row in found["foretold"]}
    for row in found["rows"][:2]:
        assert row["sent_bytes"] == foretold[row["method"]]
    assert listing(either.folder) == before


def test_what_the_run_cannot_take_is_listed(shell: Shell) -> None:
    words = ("--methods=topk,delayed", "--run=0.2", "--train.audit_every=3", "--step-seconds=0.01")
    done = shell.run(*PLAN, *words, ranks=2, seconds=200)
    assert done.code == 0 and "Measured, 0.2 s each" in done.out, done
    assert "rejected: " in done.out and "train.audit_every" in done.out and "Traceback" not in done.said, done


def test_without_a_launch(shell: Shell) -> None:
    before = listing(shell.folder)
    expect(shell.run(*PLAN), 2, "mpidp.doctor", "--link=MBIT,MS")
    done = shell.run(*PLAN, "--link=100,20", "--ranks=4", "--methods=topk")
    assert done.code == 0 and "4 ranks on 4 nodes" in done.out and "Predictions, not measurements" in done.out, done
    assert listing(shell.folder) == before


def test_wrong_words_under_mpirun(shell: Shell) -> None:
    expect(shell.run(*PLAN, "--modle.num_layers=2", ranks=2), 2, "modle.num_layers")
    expect(shell.run(*PLAN, "--run", "--ranks=3", ranks=2), 2, "--ranks=3")
    expect(shell.run(*PLAN, "--link=1,1", "--ranks=9", "--step-seconds=1", ranks=2), 2, "4 lanes")

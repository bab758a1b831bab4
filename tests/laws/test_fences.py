"""Shared memory under load. If any one of the fences is missing, a rank sometimes reads values that another rank is still
writing.

The test makes a few runs. `make soak` makes a hundred runs (MPIDP_SOAK=100).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.tiny import WORLD, corpus, sizes, tiny, train_at

pytestmark = pytest.mark.mpi
RUNS = int(os.environ.get("MPIDP_SOAK", "4"))


@pytest.fixture
def load() -> Iterator[None]:
    """Let a process compute on every core, with pauses, so that ranks are delayed at random places."""
    burn = """
import time
while True:
    until = time.perf_counter() + 0.003
    while time.perf_counter() < until: pass
    time.sleep(0.002)
"""
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1 if WORLD.rank == 0 else 0):
            burner = stack.enter_context(subprocess.Popen([sys.executable, "-c", burn]))
            stack.callback(burner.kill)
        yield


@pytest.mark.timeout(60 + 15 * RUNS)
@pytest.mark.usefixtures("load")
def test_runs_in_a_window_under_load_have_one_hash(
    shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = corpus(shared_folder)
    # Clipping at every step scales the sum in place. Without its fence this race gave two different hashes.
    sections = {"model": {"model_dim": 64, "hidden_dim": 192, "num_layers": 3}, "optim": {"clip": 0.01, "lr": 1e-2}}
    alone = train_at(1, tiny(data, shared_tmp / "alone", **sections))
    for run in range(RUNS):
        n = sizes(2, 3, 4)[run % len(sizes(2, 3, 4))]
        monkeypatch.setenv("MPIDP_PRETEND_NODES", "2" if run % 4 == 2 and n > 2 else "1")
        balance = ("even", "steal")[run % 2]
        found = train_at(n, tiny(data, shared_tmp / str(run), train={"balance": balance}, **sections))
        assert found.sha256 == alone.sha256, f"run {run} on {n} ranks, {balance}"

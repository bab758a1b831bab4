"""Laws under every MPI that is installed: the wheels of MPICH, Open MPI and Intel MPI, and Debian's MPICH 4 and Open MPI 4.

A missing MPI is skipped, with the command that installs it. docs/clusters.md has the table of what differs.

tests/faults has the laws of stopping and failed ranks for the wheels of MPICH and Open MPI.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.commands import ENTER, Forks, Shell, end_record, expect, family, faulty, kill_all, steps_logged, still_there
from tests.mpis.installed import MISSING, MpiShell, installed

pytestmark = pytest.mark.check
ELSEWHERE = ("MPICH wheel", "Open MPI wheel")  # tests/faults
SLOWLY = faulty("time.sleep(0.4)", ranks=range(9), batches=range(99)) + ENTER
SAME = ("1 rank", "2 ranks", "3 ranks", "window", "messages", "two nodes", "work stealing")
MAY_RETURN_0 = ("Debian MPICH",)  # MPICH 4's mpirun at times loses the exit code after a signal


def logged(run: Path) -> list[int]:
    return steps_logged(run) if (run / "metrics.jsonl").exists() else []


def shell_of(folder: Path, name: str) -> Shell:
    if name not in installed():
        pytest.skip(f"SKIPPED FOR LACK OF {name}: {MISSING[name]}")
    return MpiShell(folder, installed()[name])


@pytest.fixture(params=list(MISSING))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def results() -> dict[str, dict[str, object]]:
    """What the program printed under the MPIs so far."""
    return {}


def test_one_result(place: Path, name: str, results: dict[str, dict[str, object]]) -> None:
    """The weights do not depend on the MPI, the number of ranks, the transport, or the nodes."""
    ended = shell_of(place, name).run("-m", "mpi4py", "-m", "tests.mpis.program", place, ranks=3, seconds=240)
    assert ended.code == 0, ended
    found = json.loads(ended.out.splitlines()[-1])
    assert {found["hashes"][way] for way in SAME} == {found["hashes"]["1 rank"]}, found
    assert found["c10d"] == [30000.0, 0.0, 3.0, 6.0, 9.0, 0.0, 1.0, 2.0]
    others = {other: one["hashes"] for other, one in results.items()}
    assert all(hashes == found["hashes"] for hashes in others.values()), (name, found, others)
    results[name] = found


@pytest.fixture(params=[name for name in MISSING if name not in ELSEWHERE])
def other(request: pytest.FixtureRequest, place: Path) -> Shell:
    shell = shell_of(place, request.param)
    shell.mpi = request.param
    return shell


def test_exit_codes(other: Shell) -> None:
    expect(other.train("--train.steps=-1", ranks=2), 2, "train.steps")
    expect(other.train("--data.path=nowhere", ranks=3), 3, "nowhere")


def test_stopped_three_times(other: Shell, forks: Forks, prepared: Path) -> None:
    """By a file, by SIGUSR1 and by SIGTERM to the launcher; then the run ends like an uninterrupted run."""
    run, length = other.folder / "run", "--train.steps=12"
    for way in ("file", signal.SIGUSR1, signal.SIGTERM):
        before = len(logged(run))
        started = other.start("-c", SLOWLY, "tiny.toml", length, ranks=2)
        while len(logged(run)) == before:
            assert started.process.poll() is None and time.monotonic() - started.began < 60, started.so_far()
            time.sleep(0.02)
        members = family(started.process.pid)
        if isinstance(way, signal.Signals):
            started.process.send_signal(way)
        else:
            (run / "STOP").touch()
        ended = started.wait(60)
        assert not still_there(members), f"processes are left\n{ended}"
        codes = (75, 0) if other.mpi in MAY_RETURN_0 else (75, 1) if way == signal.SIGTERM else (75,)
        assert ended.code in codes and "stopped on request" in ended.err, ended
        assert end_record(run)["event"] != "end"
    expect(other.train(length, ranks=3), 0)
    expect(forks.run(prepared, "mpidp.train", "tiny.toml", length, f"--run.dir={other.folder}/whole"), 0)
    assert end_record(run)["weights_sha256"] == end_record(other.folder / "whole")["weights_sha256"]
    assert steps_logged(run) == list(range(1, 13))


def test_a_killed_rank_ends_the_job(other: Shell, whole_hash: str) -> None:
    run = other.folder / "run"
    started = other.start("-c", SLOWLY, "tiny.toml", ranks=3)
    started.until_exists(run / "checkpoints" / "step_00000002")
    members = family(started.process.pid)
    os.kill(started.ranks()[1], signal.SIGKILL)
    ended = started.wait(60)
    left = still_there(members)
    for pid in left:
        kill_all(pid)
    assert ended.code != 0 and not left, ended
    expect(other.train(ranks=2), 0)
    assert end_record(run)["weights_sha256"] == whole_hash

"""One rank fails in the middle of a step: the job ends at once, reports failure, and leaves nothing behind.

| fault, on rank 1 before batch 3 | expected | checked |
|---|---|---|
| an exception | 1, its traceback and rank | code of both mpiruns, output, no process left, the run resumes |
| an mpidp error on this rank only | its own code, the rank, no traceback | same |
| sys.exit(5) | not 0, without waiting for the watchdog | code, time |
| os._exit(9), a segmentation fault | not 0 | same |
| os._exit(0) | Open MPI: not 0; MPICH: any code, but the job ends at once and does not report success | same |
| SIGKILL to the rank from outside | not 0 | same |
| the same for a rank with the only copy of a stage | not 0; the same command resumes | hash of one rank |
| an exception while the job is built | 1, its traceback and rank | same |
| it stops making progress | 6 | test_hangs.py |
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.faults.commands import (
    ENTER,
    SAVED,
    SLOWLY,
    Ended,
    Forks,
    Shell,
    Started,
    end_record,
    expect,
    family,
    faulty,
    still_there,
)


def crash(shell: Shell, fault: str, *words: str, ranks: int = 2) -> Ended:
    """Run training with this fault on rank 1. Assert that none of its processes is alive afterwards."""
    started = shell.start("-c", faulty(fault, ranks=[1]) + ENTER, "tiny.toml", *words, ranks=ranks)
    started.until_exists(shell.folder / "run" / "checkpoints")
    return end_of(started)


def end_of(started: Started) -> Ended:
    members = family(started.process.pid)
    ended = started.wait(60)
    assert not still_there(members), f"processes are left\n{ended}"
    return ended


def check_goes_on(shell: Shell, forks: Forks, whole_hash: str) -> None:
    expect(forks.run(shell.folder, "mpidp.train", "tiny.toml"), 0)
    assert end_record(shell.folder / "run")["weights_sha256"] == whole_hash


@pytest.mark.quick
def test_an_exception(either: Shell, forks: Forks, whole_hash: str) -> None:
    ended = crash(either, "raise RuntimeError('the fault of this test')")
    assert ended.code == 1, ended
    assert ended.err.count("mpidp: rank 1 failed and ends the job:") == 1, ended
    assert ended.err.count("RuntimeError: the fault of this test") == 1, ended
    check_goes_on(either, forks, whole_hash)


def test_an_mpidp_error_of_one_rank(either: Shell, forks: Forks, whole_hash: str) -> None:
    ended = crash(either, "from mpidp.errors import DataError; raise DataError('bad on one rank')")
    expect(ended, 3, "rank 1: bad on one rank")
    check_goes_on(either, forks, whole_hash)


def test_sys_exit(either: Shell) -> None:
    ended = crash(either, "sys.exit(5)", "--run.hang_seconds=4")
    assert ended.code not in (0, 6), ended
    assert "made progress" not in ended.said, ended


CODES = {  # fault: mpirun's exit code under (MPICH, Open MPI)
    "os._exit(9)": ((9,), (9,)),
    "os._exit(0)": ((0, 1, 9), (1,)),  # MPICH's mpirun may report success, since no rank remains to report otherwise
    "os.kill(os.getpid(), signal.SIGSEGV)": ((11, 139, 9), (139,)),
}


@pytest.mark.parametrize("fault", CODES)
def test_a_process_that_is_gone(either: Shell, fault: str) -> None:
    ended = crash(either, fault)
    assert ended.code in CODES[fault][either.mpi == "openmpi"], ended
    assert "done:" not in ended.said and end_record(either.folder / "run").get("event") != "end", ended


@pytest.mark.quick
def test_a_rank_is_killed_from_outside(either: Shell, forks: Forks, whole_hash: str) -> None:
    started = either.start("-c", SLOWLY, "tiny.toml", ranks=3)
    started.until_exists(either.folder / "run" / "checkpoints" / "step_00000002")
    os.kill(started.ranks()[-1], signal.SIGKILL)
    ended = end_of(started)
    assert ended.code in ((137,) if either.mpi == "openmpi" else (9, 137)), ended
    check_goes_on(either, forks, whole_hash)


def test_a_rank_of_a_mesh_is_killed(either: Shell, forks: Forks) -> None:
    """The rank holds a stage of the model: the job ends, and its last checkpoint has all parts."""
    words = ("tiny.toml", "--model.num_layers=2", "--mesh.pp=2")
    started = either.start("-c", SLOWLY, *words, ranks=2)
    started.until_exists(either.folder / "run" / "checkpoints" / "step_00000002")
    os.kill(started.ranks()[-1], signal.SIGKILL)
    ended = end_of(started)
    assert ended.code in ((137,) if either.mpi == "openmpi" else (9, 137)), ended
    again = either.run("-m", "mpidp.train", *words, ranks=2)
    assert again.code == 0 and "resuming from run/checkpoints/step_0000000" in again.out, again
    expect(forks.run(either.folder, "mpidp.train", *words[:2], "--run.dir=alone"), 0)
    assert end_record(either.folder / "run")["weights_sha256"] == end_record(either.folder / "alone")["weights_sha256"]

@pytest.mark.long
def test_a_rank_of_a_mesh_with_slices_is_killed(either: Shell, forks: Forks) -> None:
    """The run goes on with tensor parallelism on another mesh, and then on one rank; replay finds the same bits."""
    place, slices = either.folder, ("--model.slices=2", "--model.num_layers=2", "--optim.schedule=constant")
    expect(either.train(*slices, "--run.dir=whole"), 0)
    started = either.start("-c", SLOWLY, "tiny.toml", *slices, "--mesh.tp=2", ranks=2)
    started.until_exists(place / "run" / "checkpoints" / "step_00000002")
    os.kill(started.ranks()[-1], signal.SIGKILL)
    assert end_of(started).code != 0
    expect(either.train(*slices, "--mesh.tp=2", "--mesh.pp=2", "--train.steps=5", ranks=4), 0)
    expect(forks.run(place, "mpidp.train", "tiny.toml", *slices), 0)
    assert end_record(place / "run")["weights_sha256"] == end_record(place / "whole")["weights_sha256"]
    replayed = forks.run(place, "mpidp.replay", "run", "--step", 4)
    expect(replayed, 0)
    assert "train_loss same  grad_norm same  lr same  checkpoint same" in replayed.out


def test_a_crash_loop(place: Path, forks: Forks, whole_hash: str) -> None:
    """After three starts from the checkpoint of step 2 the next is rejected, so that a user looks at the cause."""
    words = "the run was started 3 times in a row from the checkpoint of step 2, and never wrote another checkpoint. "
    fault = faulty(SAVED + "raise RuntimeError('the fault of this test')")
    for number in (1, 2, 3, 4):
        ended = forks.run(place, "mpidp.train", "tiny.toml", inject=fault)
        assert ended.code == 1 and "the fault of this test" in ended.err, f"{number}\n{ended}"  # the first began at step 0
    for _ in range(2):
        ended = forks.run(place, "mpidp.train", "tiny.toml", inject=fault)
        expect(ended, 2, words + "The last error was: rank 0: RuntimeError: the fault of this test. ",
               "remove run/tries.json", "--run.tries=4")
    assert forks.run(place, "mpidp.train", "tiny.toml", "--run.tries=4", inject=faulty("os._exit(9)")).code == 9
    expect(forks.run(place, "mpidp.train", "tiny.toml"), 2, "started 4 times in a row", "left no error message: it was killed")
    (place / "run" / "tries.json").unlink()
    check_goes_on(Shell(place), forks, whole_hash)
    assert not (place / "run" / "tries.json").exists()


def test_an_exception_while_the_parts_are_built(either: Shell) -> None:
    source = """
import mpidp.runtime.command, mpidp.train, mpidp.strategies.optimizer
from mpi4py import MPI
plain = mpidp.strategies.optimizer.Optimizer
def make(*words, **more):
    if MPI.COMM_WORLD.rank == 1:
        raise RuntimeError('the fault of this test')
    return plain(*words, **more)
mpidp.strategies.optimizer.Optimizer = make
"""
    ended = either.run("-c", source + ENTER, "tiny.toml", ranks=2)
    assert ended.code == 1, ended
    assert ended.err.count("mpidp: rank 1 failed and ends the job:") == 1, ended
    assert ended.err.count("RuntimeError: the fault of this test") == 1, ended

"""A rank stops making progress: the job ends, and the message names the rank and phase that all other ranks wait for.

| fault, on rank 1 of 3 in step 4, run.hang_seconds=4 | expected | checked |
|---|---|---|
| SIGSTOP | 6; rank 1, compute of step 4, stopped; the stacks of a waiting rank | code of both mpiruns, output |
| it sleeps forever | 6; rank 1, compute of step 4; its stacks | same |
| it never returns from a C function that holds the GIL | the same: it prints its stacks itself | same |
| it sleeps, and others wait for it in the middle of a micro-batch (mesh.shard=2, 3, mesh.tp, mesh.pp) | the same | output |
| it is stopped, alone on its node | 6; rank 1 sends no heartbeat; ranks of other nodes report this too | output |
| it sleeps, alone on its node | 6; ranks of other nodes name its phase | output |
| run.dir is removed, then it is stopped | 6; rank 1, compute of step 4, stopped | output |
| each batch of an evaluation takes 3 s, and all of it 12 s | 0: slow, not hung | code, hash |
| it is slow, alone on its node, and the other rank waits 10 s for it at a meeting | 0: slow, not hung | code, steps |
| all ranks are stopped for three times the deadline, then continue | 0: they were suspended | code, hash |
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.faults.commands import ENTER, Ended, Shell, end_record, family, faulty, steps_logged, still_there

STOP = "os.kill(os.getpid(), signal.SIGSTOP)"
SLEEP = "time.sleep(10000)"
HOLD = "lock = ctypes.PyDLL(None).pthread_mutex_lock; mutex = ctypes.create_string_buffer(64); lock(mutex); lock(mutex)"
WHERE = "in phase compute of step 4 for"


def hang(shell: Shell, fault: str, ranks: int = 3, settings: tuple[str, ...] = (), **extra: str) -> Ended:
    """Run training with this fault on rank 1. Assert that no process remains and that the message was saved for the next start.
    """
    source = faulty(fault, ranks=[1]) + ENTER
    started = shell.start("-c", source, "tiny.toml", "--run.hang_seconds=4", *settings, ranks=ranks, **extra)
    started.until_exists(shell.folder / "run" / "checkpoints")
    members = family(started.process.pid)
    ended = started.wait()
    assert not still_there(members), f"processes are left\n{ended}"
    assert ended.code == 6, ended
    return ended


def words(ended: Ended) -> list[str]:
    """Return the lines that report which rank all others wait for."""
    found = [line for line in ended.err.splitlines() if "no rank has made progress for" in line]
    assert found and all("(run.hang_seconds is 4)" in line and "exit code 6" in line for line in found), ended
    return [line.partition("(run.hang_seconds is 4): ")[2] for line in found]


@pytest.mark.quick
@pytest.mark.parametrize("fault", [STOP, SLEEP, HOLD], ids=["stopped", "sleeps", "holds the GIL"])
def test_a_rank_that_gets_no_further(either: Shell, fault: str) -> None:
    ended = hang(either, fault)
    (said,) = words(ended)  # once per node
    assert said.startswith("the other ranks wait for rank 1 (") and WHERE in said, ended
    assert "; of the others 2 are in phase comm_wait" in said, ended
    assert ("stopped (state T)" in said) == (fault == STOP), ended
    if fault == STOP:  # it cannot print: the stacks are those of a waiting rank
        assert "in exchange_reports" in ended.err, ended
    else:
        assert re.search(r'File "<string>", line \d+ in run\b', ended.err), ended
    left = json.loads((either.folder / "run" / "tries.json").read_text())
    assert left["tries"] == 1 and left["words"].startswith("the other ranks wait for rank 1 ("), left


@pytest.mark.parametrize(("ranks", "settings"), [
    (3, "mesh.shard=3"), (3, "mesh.shard=2"), (4, "mesh.tp=2 mesh.shard=3"), (4, "mesh.pp=2 mesh.shard=2"), (2, "mesh.tp=2"),
])
def test_a_rank_for_which_others_wait_while_they_compute(place: Path, ranks: int, settings: str) -> None:
    """The other ranks are in the same phase, but they wait for a message."""
    words_ = tuple(f"--{word}" for word in ("model.num_layers=2", *settings.split()))
    ended = hang(Shell(place, "mpich"), SLEEP, ranks, words_)
    said = next(line for line in ended.err.splitlines() if "no rank has made progress for" in line)
    assert re.search(rf": the other ranks wait for rank 1 \(\w+, pid \d+\), {WHERE} \d+ s; of the others", said), ended
    assert "in phase compute of step 4 (waiting for other ranks)" in said, ended


def test_a_rank_alone_on_its_node(place: Path) -> None:
    ended = hang(Shell(place, "mpich"), STOP, ranks=2, MPIDP_PRETEND_NODES="2")
    (said,) = words(ended)
    assert said.startswith("the other ranks wait for rank 1 (") and "no heartbeat received; of the others 1" in said, ended


def test_a_rank_on_another_node(place: Path) -> None:
    """Rank 0 reports the position of rank 1 from the file that rank 1's node wrote into the folder."""
    said = words(hang(Shell(place, "mpich"), SLEEP, ranks=2, MPIDP_PRETEND_NODES="2"))
    assert 1 <= len(said) <= 2 and all(one.startswith("the other ranks wait for rank 1 (") and WHERE in one for one in said), said


def test_a_run_dir_that_vanished(place: Path) -> None:
    source = faulty(f"import os; os.rename('run', 'gone'); {STOP}", ranks=[1]) + ENTER
    ended = Shell(place, "mpich").run("-c", source, "tiny.toml", "--run.hang_seconds=4", ranks=2)
    assert ended.code == 6 and "stopped (state T)" in words(ended)[0], ended


SLOW_EVALUATION = """
import time
import torch
import mpidp.runtime.command, mpidp.train
from mpi4py import MPI
from mpidp.parallel.engine import Engine
plain, calls = Engine.loss_sum, 0
def loss_sum(self, mb, key):
    global calls
    if not torch.is_grad_enabled() and MPI.COMM_WORLD.rank == 0:
        calls += 1
        time.sleep(3 * (5 <= calls <= 8))  # the second evaluation: the first may take longer anyway
    return plain(self, mb, key)
Engine.loss_sum = loss_sum
"""


def test_an_evaluation_that_is_slow_is_no_hang(place: Path) -> None:
    shell = Shell(place, "mpich")
    words = ("--run.hang_seconds=5", "--train.eval_every=2", "--train.eval_tokens=128")
    ended = shell.run("-c", SLOW_EVALUATION + ENTER, "tiny.toml", *words, ranks=2)
    assert ended.code == 0 and ended.seconds > 12, ended
    assert steps_logged(place / "run") == [1, 2, 3, 4, 5, 6]


def test_a_slow_rank_on_another_node_is_no_hang(place: Path) -> None:
    """Ranks meet every 20 steps. A step of rank 1 takes 0.5 s, so each of its phases is short, and rank 0 waits for 10 s."""
    words = ("--strategy.name=local", "--strategy.sync_every=20", "--train.steps=40", "--train.save_every=20",
             "--run.hang_seconds=3")
    fault = "delay:1:1,seconds=0.25"  # a step of rank 1 has two micro-batches
    ended = Shell(place, "mpich").train(*words, ranks=2, MPIDP_PRETEND_NODES="2", MPIDP_FAULT=fault)
    assert ended.code == 0 and ended.seconds > 20, ended
    assert end_record(place / "run")["step"] == 40, ended


def test_a_job_that_is_suspended_for_a_while(place: Path, whole_hash: str) -> None:
    """No timer ends it: neither while it is stopped, nor when it continues."""
    slowly = faulty("time.sleep(14)", range(2), batches=[2]) + ENTER  # it is stopped for 12 s of these
    started = Shell(place, "mpich").start("-c", slowly, "tiny.toml", "--run.hang_seconds=4", ranks=2)
    started.until_exists(place / "run" / "checkpoints" / "step_00000002")
    ranks = started.ranks()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in ranks:
            os.kill(pid, number)
        time.sleep(12 * (number == signal.SIGSTOP))
    ended = started.wait()
    assert ended.code == 0 and end_record(place / "run")["weights_sha256"] == whole_hash, ended

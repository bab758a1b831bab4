"""`faults.respawn=true`: new processes replace failed ranks, and the result does not change.

| when | expected | checked |
|---|---|---|
| rank 0; others; two at once; two in a row; all but one; in every kind of job | 0, full size again | as below |
| a new process fails later; all original ranks fail | same | same |
| any rank fails while new processes are started, connected, or given the state | 0, full size or the remaining ranks | same |
| no process can be started | 0, the others continue, one message | same |
| fewer than faults.min_ranks remain for a moment | 0: the limit is for the ranks that continue | same |
| any rank, with strategy local or delayed | 0, full size from the last checkpoint | losses as without failures on as many ranks |
| a STOP file while new processes are present | 75; the same command resumes on one rank | code, hash |
| an unsuitable launcher | 2 before anything is written | code, output |

Checked: the final hash, and every line of a step and of an evaluation, once and as in a run without failures; `recovered` and
`respawned` events; no process is left behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpidp.faults.respawn import LAUNCH
from tests.faults.commands import ENTER, SLOWLY, Shell, Started, expect, family, still_there
from tests.faults.test_recovery import SETTINGS, SOAK, dead, learned, lines_of, undisturbed  # noqa: F401

Learned = list[tuple[Any, ...]]


@pytest.fixture
def shell(place: Path) -> Shell:
    return Shell(place, "openmpi")


def start(
    shell: Shell, ranks: int, faults: str, *words: str, nodes: int = 1, program: tuple[str, ...] = ("-m", "mpidp.train")
) -> Started:
    launch = [word for word in LAUNCH.split() if word not in ("--mca", "coll", "^han,adapt")]  # entry.py sets these
    command = [*launch, "-n", str(ranks), "python", *program, "tiny.toml", *SETTINGS, "--faults.respawn=true", *words]
    return shell.start_command(command, MPIDP_FAULT=faults, MPIDP_PRETEND_NODES=str(nodes))


def came(lines: list[dict[str, Any]]) -> list[tuple[list[int], int]]:
    """Return the new ranks, and the number of ranks afterwards, of each respawn."""
    return [(line["came"], line["ranks"]) for line in lines if line.get("event") == "respawned"]


def check(
    shell: Shell, undisturbed: Learned, faults: str, *words: str, ranks: int = 4, nodes: int = 1,  # noqa: F811
    program: tuple[str, ...] = ("-m", "mpidp.train"),
) -> list[dict[str, Any]]:
    """Assert that the run ends as one without failures. Return its record."""
    started = start(shell, ranks, faults, *words, nodes=nodes, program=program)
    ended = started.wait()
    assert ended.code == 0, ended
    lines = lines_of(shell.folder / "run")
    assert learned(lines) == undisturbed, f"{lines}\n{ended}"
    assert ended.out.count("\nmodel: ") <= 1 and ended.out.count("done: step") == 1, ended
    return lines


ROWS: dict[str, tuple[str, list[int], list[tuple[list[int], int]], tuple[str, ...], int]] = {
    "another": ("kill:2:3:apply", [2], [([4], 4)], (), 1),
    "rank 0": ("kill:0:3:reduce", [0], [([4], 4)], (), 1),
    "two at once": ("kill:1:2:reduce kill:3:2:reduce", [1, 3], [([4, 5], 4)], (), 1),
    "two in a row, a newcomer then": ("kill:0:2:compute kill:2:4:apply kill:4:5:publish", [0, 2, 4],
                                      [([4], 4), ([5], 4), ([6], 4)], (), 1),
    "all but one": ("kill:0:2:apply kill:1:2:apply kill:3:2:apply", [0, 1, 3], [([4, 5, 6], 4)], (), 1),
    "two nodes": ("kill:0:3:apply kill:2:5:reduce", [0, 2], [([4], 4), ([5], 4)], (), 2),
    "messages": ("kill:1:3:reduce", [1], [([4], 4)], ("--comm.transport=messages",), 1),
    "a copy a rank, in an evaluation": ("kill:1:3:evaluate", [1], [([4], 4)], ("--comm.copies=rank",), 1),
    "a thread": ("kill:2:3:compute,after=0.01", [2], [([4], 4)], ("--comm.overlap=thread",), 2),
    "in the last checkpoint": ("kill:3:6:checkpoint", [3], [([4], 4)], (), 1),
}


ALWAYS = ("messages", "rank 0", "two in a row, a newcomer then", "all but one")  # the others run only in the soak test


@pytest.mark.parametrize(("name", "time"), [(n, i) for i in range(SOAK or 1) for n in (ROWS if SOAK else ALWAYS)])
def test_back_to_full_size(shell: Shell, undisturbed: Learned, name: str, time: int) -> None:  # noqa: F811
    faults, lost, events, words, nodes = ROWS[name]
    lines = check(shell, undisturbed, faults, *words, nodes=nodes)
    assert dead(lines) == lost and came(lines) == events, lines
    assert all(line["seconds"] > 0 for line in lines if line.get("event") == "respawned")


def test_min_ranks_counts_who_goes_on(shell: Shell, undisturbed: Learned) -> None:  # noqa: F811
    lines = check(shell, undisturbed, "kill:0:3:apply", "--faults.min_ranks=3", ranks=3)
    assert came(lines) == [([3], 3)], lines


@pytest.mark.parametrize("words", [("name=local", "sync_every=2"), ("name=delayed",)])
def test_methods_that_go_back(shell: Shell, words: tuple[str, ...]) -> None:
    """All ranks start from the checkpoint, because new ranks cannot get the state of these methods from other ranks."""
    method = (*(f"--strategy.{word}" for word in (*words, "meet_every=2")), "--train.save_every=2", "--train.steps=8")
    found = []
    for faults, folder in (("", "plain"), ("kill:2:5:reduce", "failed")):
        ended = start(shell, 3, faults, *method, f"--run.dir={folder}").wait()
        assert ended.code == 0, ended
        found.append(lines_of(shell.folder / folder))
    assert [line["event"] for line in found[1] if line.get("event") in ("went_back", "end")] == ["went_back", "end"], found[1]
    assert [line["ranks"] for line in found[1] if line.get("event") == "start"][-1] == 3, found[1]
    assert found[1][-1]["val_loss"] == pytest.approx(found[0][-1]["val_loss"], rel=1e-6)


MEANWHILE = {  # the faults, and the ranks that were respawned when
    "another, at once": ("kill:1:3:apply kill:2:2:respawn", [1, 2]),
    "another, while the process starts": ("kill:1:3:apply kill:2:2:respawn,after=0.3", [1, 2]),
    "rank 0, while the process starts": ("kill:1:3:apply kill:0:2:respawn,after=0.3", [0, 1]),
    "a newcomer, while others are started": ("kill:1:3:apply kill:2:3:apply kill:4:2:respawn", [1, 2]),
}


@pytest.mark.parametrize("name", MEANWHILE if SOAK else list(MEANWHILE)[:2])
def test_a_death_while_a_process_is_started(shell: Shell, undisturbed: Learned, name: str) -> None:  # noqa: F811
    faults, lost = MEANWHILE[name]
    lines = check(shell, undisturbed, faults)
    assert set(lost) <= set(dead(lines)) and came(lines)[-1][1] == 4, lines


# Rank 0 of the original ranks, or the first new process, fails when it reaches a place, once.
DIES = """
import os, pydoc, mpidp.runtime.command, mpidp.train, mpidp.training.recovery, mpidp.faults.respawn
place, _, name = {place!r}.rpartition('.')
owner = pydoc.locate(place)
plain = getattr(owner, name)
newcomer = 'OMPI_PARENT_PORT' in os.environ
failed = [newcomer]
def dies(*words, **more):
    from mpi4py import MPI
    if newcomer == {newcomer} and failed[0] and (newcomer or MPI.COMM_WORLD.rank == 0):
        try:
            os.close(os.open('died', os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), 9)
        except FileExistsError:
            pass
    return plain(*words, **more)
setattr(owner, name, dies)
again = mpidp.faults.respawn.add_rank
def add_rank(*words):
    failed[0] = True
    return again(*words)
mpidp.training.recovery.add_rank = add_rank
"""
PLACES = {  # and the number of ranks at the end
    ("mpidp.faults.respawn._broadcast", True): 3, ("mpidp.faults.respawn._bridge", False): 4,
    ("mpidp.faults.respawn._broadcast", False): 4,
    ("mpidp.training.recovery.make_topology", True): 4, ("mpidp.strategies.optimizer.Optimizer", True): 4,
    ("mpidp.strategies.optimizer.Optimizer", False): 4,
    ("mpidp.strategies.synchronous.Synchronous.resume_with_new_ranks", False): 4,
    ("mpidp.strategies.synchronous.Synchronous.resume_with_new_ranks", True): 4,
    ("mpidp.training.run_record.MetricsFile", False): 4,
    ("mpidp.training.job.Loader", True): 4,
}


@pytest.mark.parametrize(("where", "newcomer"), PLACES if SOAK else list(PLACES)[0::4])
def test_a_death_where_both_sides_meet(
    shell: Shell, undisturbed: Learned, where: str, newcomer: bool  # noqa: F811
) -> None:
    program = ("-c", DIES.format(place=where, newcomer=newcomer) + ENTER)
    lines = check(shell, undisturbed, "kill:1:3:apply", nodes=2, program=program)
    assert (shell.folder / "died").exists()
    size = [line["ranks"] for line in lines if line.get("event") in ("recovered", "respawned")][-1]
    assert size == PLACES[where, newcomer], lines


NOTHING = "import sys, mpidp.runtime.command, mpidp.train; sys.executable = '/nonexistent'\n"


def test_no_process_can_be_started(shell: Shell, undisturbed: Learned) -> None:  # noqa: F811
    started = start(shell, 3, "kill:1:2:apply kill:2:4:apply", program=("-c", NOTHING + ENTER))
    ended = started.wait()
    assert ended.code == 183, ended  # Open MPI's code, which keeps the earlier failure
    lines = lines_of(shell.folder / "run")
    assert learned(lines) == undisturbed and dead(lines) == [1, 2] and not came(lines), ended
    assert ended.out.count("no process can be started to replace a failed rank: continuing with 2 ranks") == 1, ended


def test_a_request_to_stop_with_newcomers(shell: Shell, undisturbed: Learned) -> None:  # noqa: F811
    started = start(shell, 3, "kill:0:2:reduce", program=("-c", SLOWLY))
    started.until("ranks 3 joined: continuing with 3 ranks")
    (shell.folder / "run" / "STOP").touch()
    members = family(started.process.pid)
    ended = started.wait()
    assert ended.code == 75, ended
    assert not still_there(members), ended
    expect(shell.train(*SETTINGS), 0)
    assert learned(lines_of(shell.folder / "run")) == undisturbed


LAUNCHES = {
    "mpich": ("mpirun -n 2", "a failed rank ends the job"), "openmpi": ("mpirun -n 2", "a failed rank ends the job"),
    "alone": ("", "a failed rank ends the job"), "no option": ("mpirun --with-ft ulfm -n 2", "exit with an error code"),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launchers_that_cannot(place: Path, name: str) -> None:
    launch, why = LAUNCHES[name]
    shell = Shell(place, "mpich" if name in ("mpich", "alone") else "openmpi")  # noqa: F811
    command = [*launch.split(), "python", "-m", "mpidp.train", "tiny.toml", "--faults.respawn=true"]
    expect(shell.start_command(command).wait(), 2, why, f"{LAUNCH} on one machine")
    assert not (shell.folder / "run").exists()

"""Laws of the launch: an error on one rank is one on all, ranks that differ are told apart, singletons are refused."""

from __future__ import annotations

import time

import pytest
from mpi4py import MPI

from mpidp import resolve
from mpidp.comm import mesh
from mpidp.comm.mesh import launched_size, make_mesh, polite_barrier, start_mpi, together
from mpidp.config import Config
from mpidp.errors import CheckpointError, DataError, MpidpError, Stopped, UsageError
from tests.tiny import WORLD, everywhere

pytestmark = pytest.mark.mpi
LAST = WORLD.size - 1


def caught(error: Exception | None) -> MpidpError:
    """What this rank gets when its body raises this."""
    with pytest.raises(MpidpError) as found, together(WORLD):  # noqa: PT012
        if error is not None:
            raise error
    return found.value


@pytest.mark.parametrize("kind", [UsageError, DataError, CheckpointError, Stopped, MpidpError])
def test_an_error_on_one_rank_is_raised_on_all(kind: type[MpidpError]) -> None:
    error = caught(kind("what went wrong") if WORLD.rank == LAST else None)
    said = WORLD.allgather((type(error), error.exit_code, error.everywhere, str(error)))
    place = f"rank {LAST}: " if WORLD.size > 1 else ""
    assert said == [(kind, kind.exit_code, True, f"{place}what went wrong")] * WORLD.size


def test_the_lowest_rank_speaks_when_several_fail() -> None:
    assert WORLD.allgather(str(caught(DataError(f"file {WORLD.rank}")))) == ["file 0"] * WORLD.size
    if WORLD.size > 2:
        error = caught(DataError("x") if WORLD.rank == 2 else UsageError("y") if WORLD.rank == 1 else None)
        assert WORLD.allgather((type(error), str(error))) == [(UsageError, "rank 1: y")] * WORLD.size


def test_a_crash_brings_its_traceback_everywhere() -> None:
    def crash() -> Exception:
        try:
            {}["a key"]  # noqa: B018
        except KeyError as error:
            return error
        raise AssertionError

    error = caught(crash() if WORLD.rank == LAST else None)
    everywhere(type(error) is MpidpError and error.exit_code == 1, "a crash is code 1")
    everywhere("Traceback" in str(error) and "KeyError: 'a key'" in str(error), "with its traceback")


def test_nothing_is_raised_when_nothing_fails() -> None:
    for _ in range(3):
        with together(WORLD):
            pass


def test_ranks_that_wait_sleep() -> None:
    WORLD.Barrier()
    used, began = time.process_time(), time.monotonic()
    with together(WORLD):
        if WORLD.rank == 0:
            time.sleep(1.0)
    everywhere(time.monotonic() - began > 0.95, "all wait for rank 0")
    everywhere(time.process_time() - used < 0.15, "and leave the cores alone")
    polite_barrier(WORLD)


def test_who_sits_where() -> None:
    found = make_mesh(WORLD)
    everywhere(found.dp.size == WORLD.size and found.num_nodes == 1, "one node")
    everywhere((found.local_rank, found.local_size) == (WORLD.rank, WORLD.size), "local places")


def test_hosts_are_told_apart_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh.socket, "gethostname", lambda: f"host{WORLD.rank % 2}")
    found = make_mesh(WORLD)
    everywhere(found.local_rank == WORLD.rank // 2, "the place among the ranks of this name")
    everywhere(found.local_size == (WORLD.size + 1 - WORLD.rank % 2) // 2, "how many there are")
    everywhere(found.num_nodes == min(2, WORLD.size), "how many nodes")


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, 0),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"PMI_SIZE": "3"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "8"}, 8),
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "8"}, 1),  # mpirun -n 1 inside a larger step
        ({"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "8"}, 1),
        ({"SLURM_NTASKS": "8"}, 0),  # a lone command in a batch script
        ({"PMI_SIZE": "many", "SLURM_STEP_NUM_TASKS": ""}, 0),
    ],
)
def test_what_the_launcher_meant(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], size: int) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_size() == size


def test_a_job_that_fell_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_mpi() == WORLD
    monkeypatch.setattr(mesh.MPI, "COMM_WORLD", MPI.COMM_SELF)
    monkeypatch.setattr(mesh, "launched_size", lambda: 4)
    with pytest.raises(UsageError, match="4 ranks were started, but each is alone.*mpirun -np 4"):
        start_mpi()
    monkeypatch.setattr(mesh, "launched_size", lambda: 1)
    assert start_mpi() == MPI.COMM_SELF


def test_ranks_that_differ_are_told_what_and_where() -> None:
    facts = {"torch": "2.0", "seed": "1"}
    resolve.agree(WORLD, facts)
    if WORLD.size == 1:
        return
    with pytest.raises(UsageError, match=f"seed: rank 0 has 1, rank {LAST} has 2") as found:
        resolve.agree(WORLD, facts | {"seed": "2"} if WORLD.rank == LAST else facts)
    everywhere("torch" not in str(found.value) and found.value.everywhere, "only what differs, on every rank")


def test_threads_are_the_cores_over_the_ranks_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_mesh(WORLD)
    monkeypatch.setattr(resolve.os, "sched_getaffinity", lambda pid: set(range(8)))
    everywhere(resolve.resolve_threads(0, place, WORLD) == max(1, 8 // WORLD.size), "shared cores are shared out")
    everywhere(resolve.resolve_threads(3, place, WORLD) == 3, "what is asked for is taken")
    monkeypatch.setattr(resolve.os, "sched_getaffinity", lambda pid: {2 * WORLD.rank, 2 * WORLD.rank + 1})
    everywhere(resolve.resolve_threads(0, place, WORLD) == 2, "pinned ranks have their own")


def test_the_reducer_follows_from_the_config_alone() -> None:
    everywhere(resolve.resolve_reducer(Config()) == "tree", "auto is the tree")
    everywhere(resolve.resolve_reducer(Config().with_values(comm={"reducer": "naive"})) == "naive", "as asked for")

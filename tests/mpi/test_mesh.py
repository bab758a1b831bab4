"""Laws of the launch: an error on one rank is raised on all ranks, nodes are distinguished by host name, and a launch in which
each process is a separate MPI job is rejected."""

from __future__ import annotations

import os
import socket
import time

import pytest
import torch
from mpi4py import MPI

import mpidp.comm.group
from mpidp.comm.group import alone, by_node, make_group
from mpidp.comm.slices import NORM_BLOCK
from mpidp.comm.waiting import doze, how_to_wait, spin
from mpidp.config import resolve
from mpidp.config.schema import Config
from mpidp.errors import CheckpointError, DataError, MpidpError, Stopped, UsageError
from mpidp.runtime import topology, world
from mpidp.runtime.agreement import check_agreement
from mpidp.runtime.device import resolve_threads
from mpidp.runtime.topology import Topology, make_topology
from mpidp.runtime.world import launched_size, polite_barrier, raise_together, start_mpi
from tests.tiny import WORLD, everywhere, pretended

pytestmark = pytest.mark.mpi
LAST = WORLD.size - 1


def caught(error: Exception | None) -> MpidpError:
    """Return the exception on this rank if the body raises `error`."""
    with pytest.raises(MpidpError) as found, raise_together(WORLD):  # noqa: PT012
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
        with raise_together(WORLD):
            pass


def test_ranks_that_wait_sleep() -> None:
    WORLD.Barrier()
    used, began = time.process_time(), time.monotonic()
    with raise_together(WORLD):
        if WORLD.rank == 0:
            time.sleep(1.0)
    everywhere(time.monotonic() - began > 0.95, "all wait for rank 0")
    everywhere(time.process_time() - used < 0.15, "and leave the cores alone")
    polite_barrier(WORLD)


def seats(found: Topology) -> list[tuple[int, int, int, int]]:
    """Return (rank in the world, node, place on it, its ranks) in the order of dp. Collective over WORLD."""
    return found.dp.allgather((WORLD.rank, found.node_index, found.local_rank, found.local_size))


def test_who_sits_where() -> None:
    found = make_topology(WORLD)
    everywhere(found.dp == WORLD and found.num_nodes == 1 and found.hosts == [socket.gethostname()], "one node")
    everywhere(seats(found) == [(rank, 0, rank, WORLD.size) for rank in range(WORLD.size)], "places")
    everywhere(found.node_sizes == [WORLD.size] and found.host == socket.gethostname(), "the node")


def test_hosts_are_told_apart_by_name_and_counted_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher has placed the ranks on two nodes alternately."""
    monkeypatch.setattr(topology.socket, "gethostname", lambda: f"host{WORLD.rank % 2}")
    found, size = make_topology(WORLD), WORLD.size
    dealt = [list(range(0, size, 2)), list(range(1, size, 2))][: min(2, size)]
    everywhere(seats(found) == [(r, node, i, len(ranks)) for node, ranks in enumerate(dealt) for i, r in enumerate(ranks)],
               "node by node, rank 0 first")
    everywhere(found.hosts == [f"host{node}" for node in range(len(dealt))], "the nodes")
    everywhere(found.node_sizes == [len(ranks) for ranks in dealt] and found.num_nodes == len(dealt), "and their ranks")
    everywhere(found.host == f"host{WORLD.rank % 2}", "the own node")


@pytest.fixture(params=[1, 2, 3])
def nodes(request: pytest.FixtureRequest) -> int:
    if request.param > WORLD.size:
        pytest.skip("too few ranks")
    return int(request.param)


@pytest.fixture
def found(nodes: int) -> Topology:
    """Simulate this many nodes on one machine. Collective over WORLD."""
    with pretended(nodes):
        return make_topology(WORLD)


def test_one_machine_can_pretend_to_be_several(nodes: int, found: Topology) -> None:
    everywhere(found.dp == WORLD and found.num_nodes == nodes, "so many nodes of consecutive ranks")
    everywhere(sum(found.node_sizes) == WORLD.size and max(found.node_sizes) - min(found.node_sizes) <= 1, "about equal")
    usable = {core for cores in WORLD.allgather(os.sched_getaffinity(0)) for core in cores}  # a launcher may bind ranks to cores
    everywhere(found.cores == max(1, len(usable) // nodes) or nodes > 1, "with their part of the cores")


def test_who_shares_memory_with_whom(nodes: int, found: Topology) -> None:
    shared, lone = by_node(found), alone(found)
    everywhere([len(ranks) for ranks in shared.members] == found.node_sizes, "a group a node")
    everywhere([rank for ranks in shared.members for rank in ranks] == list(range(WORLD.size)), "of consecutive ranks")
    everywhere(WORLD.rank in shared.members[shared.index] and shared.node.size == found.local_size, "this one's")
    everywhere(shared.num_rails == min(found.node_sizes) and shared.owns == (found.local_rank < shared.num_rails), "owners")
    everywhere((shared.rail.size == nodes) if shared.owns else shared.rail == MPI.COMM_NULL, "a rail over all nodes")
    slices = WORLD.allgather((shared.index, shared.slice_of(7 * NORM_BLOCK)))
    for group in range(nodes):
        of_group = [one for index, one in slices if index == group and one.start < one.stop]
        everywhere([one.start for one in of_group] == [0, *(one.stop for one in of_group[:-1])], "slices follow each other")
        everywhere(of_group[-1].stop == 7 * NORM_BLOCK, "and cover all")
    parts = shared.memory(WORLD.rank + 1, torch.device("cpu"))
    parts[shared.node.rank].fill_(WORLD.rank + 0.5)
    common = shared.common(5, torch.device("cpu"))
    if shared.node.rank == shared.node.size - 1:
        common.fill_(WORLD.rank)
    shared.fence()
    of_node = shared.members[shared.index]
    everywhere([part.tolist() for part in parts] == [[rank + 0.5] * (rank + 1) for rank in of_node], "all see all parts")
    everywhere(common.tolist() == [float(of_node[-1])] * 5, "and the common one")
    everywhere(lone.members == [range(rank, rank + 1) for rank in range(WORLD.size)] and lone.rail.size == WORLD.size, "alone")
    everywhere(lone.node.size == 1 and lone.owns and lone.index == WORLD.rank and lone.num_rails == 1, "with messages")
    shared.close()
    lone.close()


def test_the_transport_follows_from_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, found = torch.device("cpu"), make_topology(WORLD)

    def chosen(wanted: str, needed: int, device: torch.device = cpu) -> tuple[bool, str]:
        made, words = make_group(found, wanted, needed, device)
        shares = made.node.size > 1
        made.close()
        return shares, words

    several = WORLD.size > 1
    everywhere(chosen("messages", 1) == (False, "messages"), "as asked for")
    everywhere(chosen("auto", 1) == (several, "window" if several else "none (one rank)"), "a window where ranks share a node")
    everywhere(chosen("window", 1)[0] == several, "asked for")
    everywhere(not chosen("auto", 1, torch.device("cuda"))[0], "not for what lies on a GPU")
    if several:
        # The need of one rank is that of the node; the available space is one byte too small.
        monkeypatch.setattr(mpidp.comm.group, "FOR_MESSAGES", {})
        monkeypatch.setattr(mpidp.comm.group, "_free_bytes", lambda: 1000 * WORLD.size - 1)
        shares, words = chosen("auto", 1000)
        everywhere(not shares and "/dev/shm" in words and "--shm-size" in words, "too small: said how to make it larger")
        monkeypatch.setattr(mpidp.comm.group, "_free_bytes", lambda: 1000 * WORLD.size)
        everywhere(chosen("auto", 1000)[0], "just large enough")
        monkeypatch.setattr(mpidp.comm.group, "FOR_MESSAGES", {MPI.get_vendor()[0]: 1})
        everywhere(not chosen("auto", 1000)[0], "MPI needs a part of it for messages")
    monkeypatch.setenv("MPIDP_PRETEND_NODES", str(WORLD.size))
    found = make_topology(WORLD)
    everywhere(not chosen("auto", 1)[0], "one rank a node has nobody to share with")


def test_a_window_needs_an_mpi_that_knows_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under srun, Intel MPI believes that every node has equally many ranks: then it shares memory among others."""
    wrong = WORLD.Split(min(WORLD.rank, 1), WORLD.rank)  # rank 0 alone, the others together
    monkeypatch.setattr(mpidp.comm.group, "_sharing", lambda comm: wrong.Dup())
    made, words = make_group(make_topology(WORLD), "auto", 1, torch.device("cpu"))
    everywhere(made.node.size == 1 and (WORLD.size == 1 or "same number of ranks" in words), "messages")
    made.close()
    wrong.Free()


def test_who_waits_spins_where_there_are_cores_and_dozes_where_not() -> None:
    assert how_to_wait(4, 4) is spin and how_to_wait(5, 4) is doze
    if WORLD.size > 1:
        for wait in (spin, doze):
            WORLD.Barrier()
            used, began = time.process_time(), time.monotonic()
            if WORLD.rank == 0:
                time.sleep(0.5)
            wait(WORLD.Ibarrier())
            everywhere(time.monotonic() - began > 0.45, "all wait for rank 0")
            everywhere(wait is spin or time.process_time() - used < 0.2, "and leave the cores alone")


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, 0),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"PMI_SIZE": "3"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "8"}, 8),
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "8"}, 1),  # mpirun -n 1 inside a larger step
        ({"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "8"}, 1),
        ({"SLURM_NTASKS": "8"}, 0),  # a single command in a batch script
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
    monkeypatch.setattr(world.MPI, "COMM_WORLD", MPI.COMM_SELF)
    monkeypatch.setattr(world, "launched_size", lambda: 4)
    with pytest.raises(UsageError, match="4 ranks were started, but each is alone.*mpirun -np 4"):
        start_mpi()
    monkeypatch.setattr(world, "launched_size", lambda: 1)
    assert start_mpi() == MPI.COMM_SELF


def test_ranks_that_differ_are_told_what_and_where() -> None:
    facts = {"torch": "2.0", "seed": "1"}
    check_agreement(WORLD, facts)
    if WORLD.size == 1:
        return
    with pytest.raises(UsageError, match=f"seed: rank 0 has 1, rank {LAST} has 2") as found:
        check_agreement(WORLD, facts | {"seed": "2"} if WORLD.rank == LAST else facts)
    everywhere("torch" not in str(found.value) and found.value.everywhere, "only what differs, on every rank")


@pytest.mark.parametrize("nodes", [1, 2])
def test_threads_are_the_cores_over_the_ranks_of_a_node(monkeypatch: pytest.MonkeyPatch, nodes: int) -> None:
    if nodes > WORLD.size:
        pytest.skip("too few ranks")
    monkeypatch.setenv("MPIDP_PRETEND_NODES", str(nodes))
    monkeypatch.setattr(topology.os, "sched_getaffinity", lambda pid: set(range(8)))
    place = make_topology(WORLD)
    everywhere(resolve_threads(0, place) == max(1, 8 // nodes // place.local_size), "shared cores are shared out")
    everywhere(resolve_threads(3, place) == 3, "what is asked for is taken")
    monkeypatch.setattr(topology.os, "sched_getaffinity", lambda pid: {2 * WORLD.rank, 2 * WORLD.rank + 1})
    if nodes == 1:
        everywhere(resolve_threads(0, make_topology(WORLD)) == 2, "pinned ranks have their own")


def test_the_reducer_follows_from_the_config_alone() -> None:
    everywhere(resolve.resolve_reducer(Config()) == "tree", "auto is the tree")
    everywhere(resolve.resolve_reducer(Config().with_values(comm={"reducer": "naive"})) == "naive", "as asked for")
    everywhere(resolve.resolve_reducer(Config().with_values(comm={"compress": "int8"})) == "allreduce", "the tree sends all")

"""Start MPI, refuse jobs that fell apart into singletons, and know who sits where."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from mpi4py import MPI

from mpidp.comm.faults import made
from mpidp.entry import launched_size
from mpidp.errors import CheckpointError, DataError, MpidpError, Stopped, UsageError

_BY_CODE = {kind.exit_code: kind for kind in (UsageError, DataError, CheckpointError, Stopped)}


def start_mpi() -> MPI.Intracomm:
    """COMM_WORLD, after refusing N jobs of one rank that were meant to be one job of N. Collective over COMM_WORLD."""
    world = MPI.COMM_WORLD
    if world.size == 1 and launched_size() > 1:
        library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\x00 ")
        raise UsageError(
            f"{launched_size()} ranks were started, but each is alone (rank 0 of 1): the launcher and the MPI library "
            f"({library}) do not know each other. Start with the mpirun of that library (`mpirun -np {launched_size()} "
            "python -m mpidp.train`), or name its interface: `srun --mpi=pmix` for Open MPI, `srun --mpi=pmi2` for MPICH."
        )
    return world


def polite_barrier(comm: MPI.Intracomm) -> None:
    """A barrier that sleeps, so that ranks which wait long do not take the cores of those that work. Collective over comm."""
    request = comm.Ibarrier()
    pause = 1e-5
    while not request.Test():
        time.sleep(pause)
        pause = min(0.01, 2 * pause)


@contextmanager
def together(comm: MPI.Intracomm) -> Iterator[None]:
    """An exception in the body on any rank is raised on every rank; ranks that are done sooner sleep.

    The body must not communicate. Collective over comm."""
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    known = isinstance(mine, MpidpError)
    word = None if mine is None else str(mine) if known else "".join(traceback.format_exception(mine))
    polite_barrier(comm)
    words = comm.allgather(None if mine is None else (getattr(mine, "exit_code", 1), known, word))
    failed = [(rank, said) for rank, said in enumerate(words) if said is not None]
    if not failed:
        return
    rank, (code, known, word) = failed[0]
    place = f"rank {rank}: " if comm.size > 1 and len(failed) < comm.size else ""
    raise _BY_CODE.get(code, MpidpError).on_every_rank(place + word) from mine


@dataclass(frozen=True)
class Mesh:
    """Who takes part, and where: the replicas of one part of the model, or of all of it (grid.py has the other axes)."""

    dp: MPI.Intracomm  # ranks that average gradients with each other, node by node
    hosts: list[str]  # of each node
    node_sizes: list[int]  # ranks of each node
    node_index: int  # which node this is
    local_rank: int  # place among the ranks of this node
    cores: int  # that the ranks of this node may use
    numbers: list[int] = field(default_factory=list)  # of each rank, when the job began; those who came later go on counting

    @property
    def host(self) -> str:
        return self.hosts[self.node_index]

    @property
    def num_machines(self) -> int:
        """Nodes, but for those that are pretended."""
        return len({host.partition("#")[0] for host in self.hosts})

    @property
    def local_size(self) -> int:
        return self.node_sizes[self.node_index]

    @property
    def num_nodes(self) -> int:
        return len(self.hosts)


def make_mesh(world: MPI.Intracomm, before: Mesh | None = None, number: int | None = None) -> Mesh:
    """Nodes are told apart by host name, which holds in containers too. Where a launcher dealt ranks out over nodes in turn,
    dp counts them anew, node by node; rank 0 stays rank 0. before: of a job that lost ranks, of which world has the others.
    number: of a rank that came later. Collective over world.

    MPIDP_PRETEND_NODES=k in the environment cuts one node's ranks into k, for tests and benchmarks on one machine.
    """
    pretended = int(os.environ.get("MPIDP_PRETEND_NODES", "1"))
    host = socket.gethostname() + (f"#{world.rank * pretended // world.size}" if pretended > 1 else "")
    number = world.rank if number is None else number
    if before is not None:
        host, number = before.host, before.numbers[before.dp.rank]
    rows = world.allgather((host, sorted(os.sched_getaffinity(0)), number))
    named = [name for name, _, _ in rows]
    hosts = list(dict.fromkeys(named))
    in_order = sorted(range(world.size), key=lambda rank: (hosts.index(named[rank]), rank))
    dp = world if in_order == list(range(world.size)) else cast(MPI.Intracomm, world.Split(0, in_order.index(world.rank)))
    return Mesh(
        made(dp), hosts, [named.count(name) for name in hosts], hosts.index(host), named[: world.rank].count(host),
        len({core for name, allowed, _ in rows if name.partition("#")[0] == host.partition("#")[0] for core in allowed})
        // max(1, pretended),
        [rows[rank][2] for rank in in_order],
    )

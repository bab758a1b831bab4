"""Which ranks share a node."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from typing import cast

from mpi4py import MPI

from mpidp.runtime.ulfm import revocable


@dataclass(frozen=True)
class Topology:
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


def make_topology(world: MPI.Intracomm, before: Topology | None = None, number: int | None = None) -> Topology:
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
    return Topology(
        revocable(dp), hosts, [named.count(name) for name in hosts], hosts.index(host), named[: world.rank].count(host),
        len({core for name, allowed, _ in rows if name.partition("#")[0] == host.partition("#")[0] for core in allowed})
        // max(1, pretended),
        [rows[rank][2] for rank in in_order],
    )

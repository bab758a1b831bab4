"""Determines which ranks are on the same node."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from typing import cast

from mpi4py import MPI

from mpidp.runtime.ulfm import revocable


@dataclass(frozen=True)
class Topology:
    """The ranks that hold the same part of the model, one in each replica, and the nodes of these ranks."""

    dp: MPI.Intracomm  # communicator of these ranks, ordered by node
    hosts: list[str]  # host name of each node
    node_sizes: list[int]  # number of ranks on each node
    node_index: int  # index of this rank's node
    local_rank: int  # index of this rank among the ranks of its node
    cores: int  # CPU cores that the ranks of this node may use
    numbers: list[int] = field(default_factory=list)  # the permanent number of each rank; replacement ranks get new numbers

    @property
    def host(self) -> str:
        return self.hosts[self.node_index]

    @property
    def num_machines(self) -> int:
        """The number of machines. It is smaller than num_nodes if MPIDP_PRETEND_NODES is set (see make_topology())."""
        return len({host.partition("#")[0] for host in self.hosts})

    @property
    def local_size(self) -> int:
        return self.node_sizes[self.node_index]

    @property
    def num_nodes(self) -> int:
        return len(self.hosts)


def make_topology(
    world: MPI.Intracomm, before: Topology | None = None, number: int | None = None, keep_order: bool = False
) -> Topology:
    """Return the topology of the ranks of `world`. Ranks with the same host name are on one node.

    The communicator `dp` of the result numbers the ranks node by node, even if the launcher distributed them round-robin. Rank
    0 is the same rank as in `world`. `before`: after a failure, this rank's topology before the failure. `number`: the
    permanent number of this rank if it replaces a failed rank. `keep_order`: number the ranks as in `world`. A node whose
    ranks do not follow each other then counts as several nodes. Collective over world.

    MPIDP_PRETEND_NODES=k divides the ranks of one machine into k virtual nodes, for tests and benchmarks."""
    pretended = int(os.environ.get("MPIDP_PRETEND_NODES", "1"))
    host = socket.gethostname() + (f"#{world.rank * pretended // world.size}" if pretended > 1 else "")
    number = world.rank if number is None else number
    if before is not None:
        host, number = before.host, before.numbers[before.dp.rank]
    rows = world.allgather((host, sorted(os.sched_getaffinity(0)), number))
    named = [name for name, _, _ in rows]
    if keep_order:
        named = _in_runs(named)
        host = named[world.rank]
    hosts = list(dict.fromkeys(named))
    in_order = sorted(range(world.size), key=lambda rank: (hosts.index(named[rank]), rank))
    dp = world if in_order == list(range(world.size)) else cast(MPI.Intracomm, world.Split(0, in_order.index(world.rank)))
    return Topology(
        revocable(dp), hosts, [named.count(name) for name in hosts], hosts.index(host), named[: world.rank].count(host),
        len({core for name, allowed, _ in rows if name.partition("#")[0] == host.partition("#")[0] for core in allowed})
        // max(1, pretended),
        [rows[rank][2] for rank in in_order],
    )


def _in_runs(names: list[str]) -> list[str]:
    """Return the names. If a name occurs again after other names, it gets a suffix, so that only neighbours have equal names.
    Pure."""
    found: list[str] = []
    for i, name in enumerate(names):
        label = name
        if i and names[i - 1] == name:
            label = found[-1]
        else:
            while label in found:
                label += "#"
        found.append(label)
    return found

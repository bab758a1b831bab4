"""Who reads whose memory: the ranks of a node through MPI shared-memory windows, with messages between nodes.

A *group* is a set of ranks with consecutive places that share memory. It holds one sum of gradients: its first `num_rails`
ranks own a slice of it each. The owners of one slice in all groups form a *rail*, along which messages go. With messages
alone every rank is a group of its own, and the one rail is everybody.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import cast

import torch
from mpi4py import MPI

from mpidp.comm.buckets import NORM_BLOCK, slice_bounds
from mpidp.comm.mesh import Mesh
from mpidp.comm.waiting import Wait, how_to_wait

SHARED_MEMORY = "/dev/shm"  # where both MPIs keep shared windows


@dataclass
class Group:
    """This rank's group, and its rail."""

    node: MPI.Intracomm  # the ranks that share memory
    rail: MPI.Intracomm  # owners of this rank's slice, in order of groups; COMM_NULL for a rank that owns none
    members: list[range]  # ranks of each group
    index: int  # which group this is
    num_rails: int
    wait: Wait
    _windows: list[MPI.Win] = field(default_factory=list)

    @property
    def owns(self) -> bool:
        """Does this rank own a slice?"""
        return self.node.rank < self.num_rails

    def slice_of(self, num_elements: int) -> slice:
        """This rank's slice of a flat tensor: whole norm blocks, nothing for a rank that owns none. Independent."""
        if not self.owns:
            return slice(0, 0)
        bounds = slice_bounds(num_elements, self.num_rails, NORM_BLOCK)
        return slice(bounds[self.node.rank], bounds[self.node.rank + 1])

    def fence(self, wait: Wait | None = None) -> None:
        """What any rank of the group wrote before this is what all read after it. Collective over node."""
        if self.node.size > 1:
            for window in self._windows:
                window.Sync()
            (wait or self.wait)(self.node.Ibarrier())
            for window in self._windows:
                window.Sync()

    def memory(self, elements: int, device: torch.device) -> list[torch.Tensor]:
        """Zeroed float32 memory: `elements` for this rank (ranks may differ), and every rank's part in order. Collective over
        node."""
        if self.node.size == 1:
            return [torch.zeros(elements, device=device)]
        window = MPI.Win.Allocate_shared(4 * elements, 4, comm=self.node)
        window.Lock_all(MPI.MODE_NOCHECK)
        self._windows.append(window)
        parts = []
        for rank in range(self.node.size):
            part = window.Shared_query(rank)[0]
            parts.append(torch.frombuffer(part, dtype=torch.float32) if part.nbytes else torch.empty(0))
        parts[self.node.rank].zero_()  # touched by its owner: its pages lie near it, and are there before step 1
        self.fence()
        return parts

    def common(self, elements: int, device: torch.device) -> torch.Tensor:
        """Zeroed float32 memory, (elements,), of which the group has one copy. Collective over node."""
        return self.memory(elements if self.node.rank == 0 else 0, device)[0]

    def close(self) -> None:
        """Free the windows: tensors over them must not be used any more. Collective over node, then over rail."""
        for window in reversed(self._windows):
            window.Unlock_all()
            window.Free()
        self._windows.clear()
        for comm in (self.node, self.rail):
            if comm != MPI.COMM_NULL and comm != MPI.COMM_SELF:
                comm.Free()


def alone(mesh: Mesh) -> Group:
    """Every rank a group: messages alone. Collective over mesh.dp."""
    members = [range(rank, rank + 1) for rank in range(mesh.dp.size)]
    wait = how_to_wait(mesh.local_size, mesh.cores)
    return Group(MPI.COMM_SELF, mesh.dp.Dup(), members, mesh.dp.rank, 1, wait)


def by_node(mesh: Mesh) -> Group:
    """A group a node. Collective over mesh.dp."""
    members, first = [], 0
    for size in mesh.node_sizes:
        members.append(range(first, first + size))
        first += size
    num_rails = min(mesh.node_sizes)
    node = cast(MPI.Intracomm, mesh.dp.Split(mesh.node_index, mesh.dp.rank))
    my_rail = mesh.local_rank if mesh.local_rank < num_rails else MPI.UNDEFINED
    rail = cast(MPI.Intracomm, mesh.dp.Split(my_rail, mesh.dp.rank))
    return Group(node, rail, members, mesh.node_index, num_rails, how_to_wait(mesh.local_size, mesh.cores))


def make_group(mesh: Mesh, transport: str, needed_bytes: int, device: torch.device) -> tuple[Group, str]:
    """The groups for comm.transport=auto|window|messages, and in words which and why. needed_bytes: shared memory that this
    rank will ask for. A window larger than /dev/shm would end in a SIGBUS, so that is asked first, and all nodes take the
    same path. Collective over mesh.dp."""
    if transport == "messages":
        return alone(mesh), "messages"
    if device.type != "cpu":
        return alone(mesh), "messages (windows hold gradients of the CPU)"
    if max(mesh.node_sizes) == 1:
        return alone(mesh), "messages (one rank a node)" if mesh.dp.size > 1 else "nothing to send"
    rows = mesh.dp.allgather((mesh.node_index, needed_bytes, _free_bytes()))
    for node, host in enumerate(mesh.hosts):
        needed = sum(n for index, n, _ in rows if index == node)
        free = min(n for index, _, n in rows if index == node)
        if needed > free:
            return alone(mesh), (
                f"messages ({SHARED_MEMORY} on {host} has {free / 2**20:,.0f} MiB free, a shared window would take "
                f"{needed / 2**20:,.0f}; a larger one, e.g. docker run --shm-size, makes averaging faster)"
            )
    return by_node(mesh), "window" + (", messages between nodes" if len(mesh.node_sizes) > 1 else "")


def _free_bytes() -> int:
    try:
        told = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return told.f_bavail * told.f_frsize

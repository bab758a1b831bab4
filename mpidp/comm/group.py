"""Who reads whose memory: the ranks of a node through MPI shared-memory windows, with messages between nodes.

A *group* is a set of ranks with consecutive places that share memory. It holds one sum of gradients: its first `num_rails`
ranks own a slice of it each. The owners of one slice in all groups form a *rail*, along which messages go. With messages
alone every rank is a group of its own, and the one rail is everybody.

Where the job outlives its ranks the memory does too: a window dies with its communicator, so it is a file without a name, and
what is left of a group goes on with the memory of the group before.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from mpi4py import MPI

from mpidp.comm.slices import NORM_BLOCK, slice_bounds
from mpidp.comm.waiting import Wait, how_to_wait, spin
from mpidp.runtime.environment import launched_with_ulfm
from mpidp.runtime.topology import Topology
from mpidp.runtime.ulfm import revocable
from mpidp.runtime.world import raise_together

SHARED_MEMORY = "/dev/shm"  # where both MPIs keep shared windows


@dataclass
class Group:
    """This rank's group, and its rail."""

    node: MPI.Intracomm  # the ranks that share memory
    rail: MPI.Intracomm  # owners of this rank's slice, in order of groups; COMM_NULL for a rank that owns none
    members: list[range]  # ranks of each group
    index: int  # which group this is
    num_rails: int
    wait: Wait  # of this rank: nodes may differ
    all_spin: bool  # does every rank of the job wait so?
    shares: bool = False  # do the ranks of a node share memory, where there is more than one?
    _windows: list[MPI.Win] = field(default_factory=list)
    _given: list[list[torch.Tensor]] = field(default_factory=list)  # all that memory() gave
    _before: list[list[torch.Tensor]] = field(default_factory=list)  # what it will give, of the group before

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

    def memory(self, elements: int, device: torch.device, room: int = 0) -> list[torch.Tensor]:
        """Zeroed float32 memory: `elements` for this rank (ranks may differ), and every rank's part in order. Where the job
        outlives its ranks each part has `room` elements, untouched beyond, and a group that goes on with the memory of another
        gets that: as it is, in the order in which the other asked for it. Collective over node."""
        room = max(elements, room) if launched_with_ulfm() else elements
        if found := self._found(elements):
            return found
        if self.node.size == 1:
            parts = [torch.empty(room, device=device)]
        elif launched_with_ulfm():
            parts = self._map(room)
        else:
            parts = self._window(elements)
        parts[self.node.rank][:elements].zero_()  # touched by its owner: its pages lie near it, and are there before step 1
        self.fence()
        self._given.append(parts)
        return parts

    def _window(self, elements: int) -> list[torch.Tensor]:
        window = MPI.Win.Allocate_shared(4 * elements, 4, comm=self.node)
        window.Lock_all(MPI.MODE_NOCHECK)
        self._windows.append(window)
        return [_floats(window.Shared_query(rank)[0]) for rank in range(self.node.size)]

    def _map(self, elements: int) -> list[torch.Tensor]:
        """Memory of the operating system's that no communicator owns: it is gone with the last process that sees it, and its
        pages are there once they are written to."""
        counts = self.node.allgather(elements)
        handle = -1
        if self.node.rank == 0:
            handle = os.memfd_create("mpidp")
            os.ftruncate(handle, 4 * sum(counts))
        path = self.node.bcast(f"/proc/{os.getpid()}/fd/{handle}")
        with raise_together(self.node):
            seen = os.open(path, os.O_RDWR) if self.node.rank else handle
            flat = _floats(mmap.mmap(seen, 4 * sum(counts)))
        os.close(seen)  # once all have opened it
        return list(flat.split(counts))

    def common(self, elements: int, device: torch.device) -> torch.Tensor:
        """Zeroed float32 memory, (elements,), of which the group has one copy; or that of the group before, as it is. Collective
        over node."""
        held = self.memory(elements if self.node.rank == 0 else 0, device)[0]
        self._given[-1] = [held]
        return held

    def own(self, elements: int, device: torch.device) -> torch.Tensor:
        """The same as memory(), seen by this rank alone: (elements,). Independent."""
        if not self._found(elements):
            self._given.append([torch.zeros(elements, device=device)])
        return self._given[-1][0]

    def _found(self, elements: int) -> list[torch.Tensor]:
        """The next memory of the group before, where there is one and this rank's part is large enough."""
        if not self._before:
            return []
        found = self._before.pop(0)
        if found[self.node.rank if len(found) > 1 else 0].numel() < elements:
            return []
        self._given.append(found)
        return found

    def reuse_memory(self, before: Group) -> None:
        """Let memory() give what another group was given, of which this one's ranks were a part. Independent."""
        places = MPI.Group.Translate_ranks(self.node.group, list(range(self.node.size)), before.node.group)
        # One part for many ranks is what they have in common, also when the rank is dead that asked for it.
        self._before = [parts if len(parts) == 1 else [parts[place] for place in places] for parts in before._given]

    def close(self) -> None:
        """Free the windows: tensors over them must not be used any more. Collective over node, then over rail."""
        for window in reversed(self._windows):
            window.Unlock_all()
            window.Free()
        self._windows.clear()
        for comm in (self.node, self.rail):
            if comm != MPI.COMM_NULL and comm != MPI.COMM_SELF:
                comm.Free()


def _floats(memory: Any) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.float32) if memoryview(memory).nbytes else torch.empty(0)


def _waiting(mesh: Topology) -> tuple[Wait, bool]:
    wait = how_to_wait(mesh.local_size, mesh.cores)
    return wait, mesh.dp.allreduce(wait is spin, op=MPI.LAND)


def alone(mesh: Topology) -> Group:
    """Every rank a group: messages alone. Collective over mesh.dp."""
    members = [range(rank, rank + 1) for rank in range(mesh.dp.size)]
    return Group(MPI.COMM_SELF, revocable(mesh.dp.Dup()), members, mesh.dp.rank, 1, *_waiting(mesh))


def by_node(mesh: Topology) -> Group:
    """A group a node. Collective over mesh.dp."""
    members, first = [], 0
    for size in mesh.node_sizes:
        members.append(range(first, first + size))
        first += size
    num_rails = min(mesh.node_sizes)
    node = revocable(cast(MPI.Intracomm, mesh.dp.Split(mesh.node_index, mesh.dp.rank)))
    my_rail = mesh.local_rank if mesh.local_rank < num_rails else MPI.UNDEFINED
    rail = revocable(cast(MPI.Intracomm, mesh.dp.Split(my_rail, mesh.dp.rank)))
    return Group(node, rail, members, mesh.node_index, num_rails, *_waiting(mesh), shares=True)


def regroup(mesh: Topology, before: Group) -> Group:
    """Groups of the same kind over those who are left, with the memory that their groups had before. Collective over mesh.dp."""
    group = by_node(mesh) if before.shares else alone(mesh)
    group.reuse_memory(before)
    return group


def make_group(mesh: Topology, transport: str, needed_bytes: int, device: torch.device) -> tuple[Group, str]:
    """The groups for comm.transport=auto|window|messages, and in words which and why. needed_bytes: shared memory that this
    rank will ask for. A window larger than /dev/shm would end in a SIGBUS, so that is asked first, and all nodes take the
    same path. Collective over mesh.dp."""
    if transport == "messages":
        return alone(mesh), "messages"
    if device.type != "cpu":
        return alone(mesh), "messages (windows hold gradients of the CPU)"
    if max(mesh.node_sizes) == 1:
        return alone(mesh), "messages (one rank a node)" if mesh.dp.size > 1 else "nothing to send"
    if launched_with_ulfm():
        return by_node(mesh), "shared memory that outlives a rank"
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

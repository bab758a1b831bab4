"""Groups of ranks that sum gradients. Within a group, ranks use shared memory. Between groups, they use MPI messages.

A *group* is a set of consecutive ranks that share memory. Each group stores one sum of gradients. Each of the first `num_rails`
ranks of a group owns one slice of this sum. The owners of the same slice, one in each group, form a *rail* and exchange MPI
messages. Without shared memory every rank is its own group, and one rail contains all ranks.

With MPI fault tolerance (ULFM), shared memory must survive failed ranks. MPI's shared-memory windows do not survive, because
they are freed with their communicator. A group therefore maps an anonymous file (memfd) instead. After a failure, the
remaining ranks keep the memory of their previous group.
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

SHARED_MEMORY = "/dev/shm"  # where MPI keeps shared-memory windows
# Bytes of SHARED_MEMORY that an MPI library allocates for messages on each rank, after the windows. Without this space, the
# rank ends with a bus error. Intel MPI 2021.18 and 2021.19 allocated up to 16 MiB. MPICH and Open MPI allocate at their start.
FOR_MESSAGES = {"Intel MPI": 16 << 20}


@dataclass
class Group:
    """The group of ranks that share memory with this rank, and the rail of this rank. Without shared memory, each rank is its own
    group."""

    node: MPI.Intracomm  # the ranks that share memory
    rail: MPI.Intracomm  # the owners of this rank's slice, in order of groups; COMM_NULL for a rank that owns no slice
    members: list[range]  # the ranks of each group, by index of the group
    index: int  # index of this rank's group in members
    num_rails: int  # number of slices of the sum
    wait: Wait  # how this rank waits for requests; may differ between nodes
    all_spin: bool  # whether every rank of the job waits with spin()
    shares: bool = False  # whether the ranks of a node share memory
    _windows: list[MPI.Win] = field(default_factory=list)
    _given: list[list[torch.Tensor]] = field(default_factory=list)  # all allocations of memory, in order
    _before: list[list[torch.Tensor]] = field(default_factory=list)  # allocations of the previous group, reused in order

    @property
    def owns(self) -> bool:
        """Whether this rank owns a slice."""
        return self.node.rank < self.num_rails

    def slice_of(self, num_elements: int) -> slice:
        """Return the slice (range of elements) that this rank owns in a flat tensor with `num_elements` elements. The slice
        consists of whole norm blocks (4,096 elements). It is empty if the rank owns no slice. Independent."""
        if not self.owns:
            return slice(0, 0)
        bounds = slice_bounds(num_elements, self.num_rails, NORM_BLOCK)
        return slice(bounds[self.node.rank], bounds[self.node.rank + 1])

    def fence(self, wait: Wait | None = None) -> None:
        """Synchronize the ranks of the group. Then every rank sees what the others wrote to shared memory before the call.
        `wait`: the function that waits for the other ranks. By default, this is the attribute `wait`. Collective over node."""
        if self.node.size > 1:
            for window in self._windows:
                window.Sync()
            (wait or self.wait)(self.node.Ibarrier())
            for window in self._windows:
                window.Sync()

    def memory(self, elements: int, device: torch.device, room: int = 0) -> list[torch.Tensor]:
        """Return one float32 tensor (n,) per rank of the group, in order of ranks. Every rank sees all of them. This rank's
        tensor has `elements` elements, which are 0. Other ranks may request other sizes. With fault tolerance, this rank's tensor
        has `room` elements if `room` is larger than `elements`. Collective over node.

        If the group reuses the memory of a previous group, return that group's tensors with their contents. Successive calls
        return the tensors of that group in the order in which they were allocated.
        """
        room = max(elements, room) if launched_with_ulfm() else elements
        if found := self._found(elements):
            return found
        if self.node.size == 1:
            parts = [torch.empty(room, device=device)]
        elif launched_with_ulfm():
            parts = self._map(room)
        else:
            parts = self._window(elements)
        parts[self.node.rank][:elements].zero_()  # the first write places the memory pages near the core of the writing rank
        self.fence()
        self._given.append(parts)
        return parts

    def _window(self, elements: int) -> list[torch.Tensor]:
        window = MPI.Win.Allocate_shared(4 * elements, 4, comm=self.node)
        window.Lock_all(MPI.MODE_NOCHECK)
        self._windows.append(window)
        return [_floats(window.Shared_query(rank)[0]) for rank in range(self.node.size)]

    def _map(self, elements: int) -> list[torch.Tensor]:
        """Return shared memory from an anonymous file: one tensor per rank, in order of ranks. The file belongs to no
        communicator. The system frees it when no process maps it any more."""
        counts = self.node.allgather(elements)
        handle = -1
        if self.node.rank == 0:
            handle = os.memfd_create("mpidp")
            os.ftruncate(handle, 4 * sum(counts))
        path = self.node.bcast(f"/proc/{os.getpid()}/fd/{handle}")
        with raise_together(self.node):
            seen = os.open(path, os.O_RDWR) if self.node.rank else handle
            flat = _floats(mmap.mmap(seen, 4 * sum(counts)))
        os.close(seen)  # all ranks have opened the file by now
        return list(flat.split(counts))

    def common(self, elements: int, device: torch.device) -> torch.Tensor:
        """Return one float32 tensor (elements,) that all ranks of the group share. Its elements are 0. After reuse_memory(),
        the result can instead be a tensor of the previous group, with its contents. Collective over node."""
        held = self.memory(elements if self.node.rank == 0 else 0, device)[0]
        self._given[-1] = [held]
        return held

    def own(self, elements: int, device: torch.device) -> torch.Tensor:
        """Return a float32 tensor (elements,) that is private to this rank. Its elements are 0. After reuse_memory(), the
        result can instead be a tensor of the previous group, with its contents. Independent."""
        if not self._found(elements):
            self._given.append([torch.zeros(elements, device=device)])
        return self._given[-1][0]

    def _found(self, elements: int) -> list[torch.Tensor]:
        """Take the oldest allocation of the previous group that is left, and return its tensors. Return [] if no allocation is
        left, or if this rank's tensor in the allocation has fewer than `elements` elements."""
        if not self._before:
            return []
        found = self._before.pop(0)
        if found[self.node.rank if len(found) > 1 else 0].numel() < elements:
            return []
        self._given.append(found)
        return found

    def reuse_memory(self, before: Group) -> None:
        """Make memory() return the tensors of the group `before`, which contained all ranks of this group. Independent."""
        places = MPI.Group.Translate_ranks(self.node.group, list(range(self.node.size)), before.node.group)
        # A single tensor is shared by all ranks, even if the rank that allocated it has failed.
        self._before = [parts if len(parts) == 1 else [parts[place] for place in places] for parts in before._given]

    def close(self) -> None:
        """Free the windows and communicators. The tensors of the windows must not be used afterwards. Collective over node, then
        over rail."""
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
    """Make every rank its own group, so that all ranks exchange MPI messages. Collective over mesh.dp."""
    members = [range(rank, rank + 1) for rank in range(mesh.dp.size)]
    return Group(MPI.COMM_SELF, revocable(mesh.dp.Dup()), members, mesh.dp.rank, 1, *_waiting(mesh))


def by_node(mesh: Topology) -> Group:
    """Make one group per node. Collective over mesh.dp."""
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
    """Make new groups of the remaining ranks after a failure, and return this rank's group. The new groups share memory if the
    previous groups did, and keep the contents. `before`: the previous group of this rank. Collective over mesh.dp."""
    group = by_node(mesh) if before.shares else alone(mesh)
    group.reuse_memory(before)
    return group


def make_group(mesh: Topology, transport: str, needed_bytes: int, device: torch.device) -> tuple[Group, str]:
    """Make the groups. `transport`: the value of comm.transport (auto, window or messages). Return (this rank's group,
    description of the transport for the user). All nodes use the same transport. Collective over mesh.dp.

    `needed_bytes`: the size of the shared memory that this rank will allocate. If /dev/shm has too little free space, messages
    are used. A rank whose window does not fit would end with a bus error.
    """
    if transport == "messages":
        return alone(mesh), "messages"
    if device.type != "cpu":
        return alone(mesh), "messages (shared-memory windows work only for gradients on the CPU)"
    if max(mesh.node_sizes) == 1:
        return alone(mesh), "messages (one rank per node)" if mesh.dp.size > 1 else "none (one rank)"
    if launched_with_ulfm():
        return by_node(mesh), "shared memory that survives failed ranks"
    if not _mpi_agrees(mesh):
        return alone(mesh), (
            "messages (MPI cannot share memory among all ranks of each host; with Intel MPI, "
            "start the same number of ranks on each node)"
        )
    margin = FOR_MESSAGES.get(MPI.get_vendor()[0], 0)
    rows = mesh.dp.allgather((mesh.node_index, needed_bytes + margin, _free_bytes()))
    for node, host in enumerate(mesh.hosts):
        needed = sum(n for index, n, _ in rows if index == node)
        free = min(n for index, _, n in rows if index == node)
        if needed > free:
            return alone(mesh), (
                f"messages ({SHARED_MEMORY} on {host} has {free / 2**20:,.0f} MiB free, but a shared-memory window needs "
                f"{needed / 2**20:,.0f} MiB; a larger {SHARED_MEMORY}, e.g. docker run --shm-size, makes averaging faster)"
            )
    return by_node(mesh), "window" + (", messages between nodes" if len(mesh.node_sizes) > 1 else "")


def _mpi_agrees(mesh: Topology) -> bool:
    """Return True if MPI can share memory among all ranks of each host. Under srun, Intel MPI cannot share memory in this way
    if the nodes have different numbers of ranks. Collective over mesh.dp."""
    shared = _sharing(mesh.dp)
    here = MPI.Group.Translate_ranks(shared.group, None, mesh.dp.group)
    first = sum(mesh.node_sizes[: mesh.node_index])
    agrees = set(range(first, first + mesh.local_size)) <= set(here)
    shared.Free()
    return bool(mesh.dp.allreduce(agrees, op=MPI.LAND))


def _sharing(comm: MPI.Intracomm) -> MPI.Intracomm:
    return cast(MPI.Intracomm, comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank))


def _free_bytes() -> int:
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize

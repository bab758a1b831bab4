"""The reducer `tree` adds the ranks' gradients in the order of the tree over lanes (tree_order.py). A lane is a fixed sequence
of micro-batches. The flat gradient is cut into slices, and each slice is added by its owners.

A group is the ranks of a node that share memory. A rank without shared memory is a group of its own. In a group, the owner of a
slice reads the buffers of all ranks and adds them in place. The sum is stored in slot 0 of the group's first rank. Between
groups, the owners of the same slice exchange messages. The slice is cut into one range per group, and each owner sums one range.
For this range, the owner receives the tree nodes (partial sums) that remain in the other groups, adds the nodes of all groups,
and sends the sum to the other owners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from mpidp.comm.group import Group
from mpidp.comm.slices import ALIGN, NORM_BLOCK, slice_bounds
from mpidp.comm.transport import Messages, pieces
from mpidp.data.lanes import Lanes
from mpidp.reducers import tree_order
from mpidp.reducers.base import Allreduce, LaneObserver, LaneShares, Naive, Reducer, Root
from mpidp.reducers.buckets import Bucket, GradientBuffer

CACHED = 1 << 16  # elements that are added at a time; they stay in the cache between two additions
Slot = tuple[int, int]  # (rank in the group, slot)
Held = tuple[tuple[tree_order.Node, Slot], ...]


@dataclass(frozen=True)
class FoldPlan:
    """The additions of one step, in the order in which they are made."""

    additions: list[tuple[Slot, Slot]]  # (into, from) in this group
    left_over: list[Slot]  # slots of the tree nodes that then remain in this group, from left to right
    num_nodes: list[int]  # number of remaining nodes of each group
    program: list[tuple[tuple[int, int], tuple[int, int]]]  # (into, from) between groups, each (group, index of the node)
    sum_at: tuple[int, int]  # (group, index of the node) of the sum


def slots_needed(lanes: Lanes, mine: range, max_lanes: int, static: bool, kept_apart: bool) -> int:
    """Return the number of gradient buffers (slots) that a rank needs. mine: the lanes (sequences of micro-batches) that
    the rank has at the start. max_lanes: the largest number of consecutive lanes that the rank may get later, or 0 if its lanes
    never change. static: whether lanes are fixed before each step. If not, two more slots are needed. kept_apart: whether the
    gradients of single lanes are needed in some steps. Independent."""
    count, share = lanes.num_lanes, lanes.num_lanes == lanes.num_micro_batches and not kept_apart
    runs = [mine]
    if max_lanes:
        runs = [range(at, at + max_lanes) for at in range(min(count - max_lanes + 1, 1 << max_lanes.bit_length()))]
    return max(tree_order.held_after(run, count, share)[1] for run in runs) + (0 if static else 2)


class Tree(Reducer):
    """Implements comm.reducer=tree. The bits of the sum do not depend on which rank computes or adds a lane."""

    def __init__(
        self, group: Group, lanes: Lanes, transport: Messages, shares: LaneShares, num_slots: int = 1, **more: Any
    ) -> None:
        """num_slots: the result of slots_needed(). Independent."""
        super().__init__(group, lanes, transport, shares, num_slots, **more)
        self._first = {lanes.micro_batches(lane)[0]: lane for lane in range(lanes.num_lanes)}
        self._last = {lanes.micro_batches(lane)[-1]: lane for lane in range(lanes.num_lanes)}
        self._plan = lru_cache(maxsize=64)(self._make_plan)
        self.observe_lanes(())

    def observe_lanes(self, observers: Sequence[LaneObserver]) -> None:
        self._lane_observers = observers
        self._share = self.lanes.num_lanes == self.lanes.num_micro_batches and not observers
        self.discard()

    def discard(self) -> None:
        self._folds: list[tuple[int, int]] | None = None  # additions after the last lane; begin() makes them by bucket
        self._held: Held | None = None
        # The micro-batches and additions have the same order in every chunk, so all chunks end in the same slots.
        self._tree_sums = [tree_order.TreeSum(self.lanes.num_lanes, self._share) for _ in self.spans]
        self._slots = [0 for _ in self.spans]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """A list with (start, stop) of each chunk of the model in the flat gradient."""
        return self.buffer.spans if hasattr(self, "buffer") else [(0, 0)]

    def attach(self, buffer: GradientBuffer) -> None:
        super().attach(buffer)
        self.discard()

    def open(self, v: int, last: bool = False, chunk: int = 0) -> None:
        tree_sum = self._tree_sums[chunk]
        if v in self._first:
            slot, fresh = tree_sum.open(self._first[v])
            self._slots[chunk] = slot
            self.buffer.point(slot, chunk)
            if fresh:
                start, stop = self.spans[chunk]
                self.buffer.flat[slot, start:stop].zero_()
        if last and self.overlaps():
            self._folds = tree_sum.close(self._last[v])  # begin() makes these additions

    def close(self, v: int, chunk: int = 0) -> None:
        if v in self._last and self._folds is None:
            for observe in self._lane_observers:
                observe(self._last[v], self.buffer.flat[self._slots[chunk]])
            self._fold(self._tree_sums[chunk].close(self._last[v]), *self.spans[chunk])

    def _fold(self, folds: list[tuple[int, int]], start: int, stop: int) -> None:
        for into, source in folds:
            self.buffer.flat[into, start:stop] += self.buffer.flat[source, start:stop]

    def overlaps(self) -> bool:
        return self.worker is not None and not self._lane_observers and self.shares.static

    def begin(self, bucket: Bucket) -> None:
        self._fold(self._folds or [], bucket.start, bucket.stop)
        super().begin(bucket)

    def has_free_slot(self) -> bool:
        return len(self._tree_sums[0].nodes) < self.num_slots

    def finish(self) -> None:
        """Finish the sum, so that all ranks of the group can read it in buffer.total. Collective over all ranks."""
        self._held = self._gather_held() if not self.shares.static else None
        if self.worker is not None:
            super().finish()
        else:
            with self.transport.timed():
                self._reduce(0, self.buffer.num_elements, NORM_BLOCK)
        with self.transport.timed():
            self.group.fence()
        self.discard()
        self.buffer.point(0)

    def reduce(self, bucket: Bucket) -> None:
        self._reduce(bucket.start, bucket.stop, ALIGN)

    def _reduce(self, start: int, stop: int, multiple: int) -> None:
        """Sum the elements [start, stop) over the ranks. The distance from `start` to the start of each owner's slice is
        divisible by `multiple`. Collective over all ranks."""
        self.group.fence(self.wait)
        if not self.group.owns:
            return
        plan = self._plan(tuple(self.shares.ranges), self._held, self._share)
        bounds = slice_bounds(stop - start, self.group.num_rails, multiple)
        low, high = start + bounds[self.group.node.rank], start + bounds[self.group.node.rank + 1]
        self._add_in_group(plan, low, high)
        if len(self.group.members) > 1:
            for piece in pieces(low, high):
                self._add_between_groups(plan, *piece)

    def _gather_held(self) -> Held:
        """Return the tree nodes that the ranks of the group hold, with their slots. This information is needed if ranks may
        take lanes of other ranks. Collective over the group."""
        table = np.full((self.group.node.size, 2 * self.lanes.num_lanes.bit_length() + 3, 2), -1, dtype=np.int64)
        for node, slot in self._tree_sums[0].nodes.items():
            table[self.group.node.rank, slot] = node
        self.group.wait(self.group.node.Iallgather(MPI.IN_PLACE, table))
        return tuple(
            ((int(table[r, j, 0]), int(table[r, j, 1])), (r, j)) for r, j in np.argwhere(table[:, :, 0] >= 0).tolist()
        )

    def _make_plan(self, ranges: tuple[range, ...], held: Held | None, share: bool) -> FoldPlan:
        """Plan the additions. ranges: the lanes of each rank. held: the tree nodes in the group, and their slots. If `held` is
        None, each rank has computed its lanes in order. share: whether sibling lanes share a slot (tree_order.TreeSum). Raises
        ValueError unless every lane occurs once."""
        count = self.lanes.num_lanes
        if held is None:
            of_ranks = [tree_order.held_after(ranges[r], count, share)[0] for r in self.group.members[self.group.index]]
            held = tuple((node, (r, slot)) for r, nodes in enumerate(of_ranks) for node, slot in nodes.items())
        additions, left_over = tree_order.fold(held, count)
        everywhere, num_nodes = [], []
        for g, members in enumerate(self.group.members):
            lanes = range(ranges[members[0]].start, ranges[members[-1]].stop)
            nodes = [node for node, _ in tree_order.fold([((0, lane), lane) for lane in lanes], count)[1]]
            everywhere += [(node, (g, j)) for j, node in enumerate(nodes)]
            num_nodes.append(len(nodes))
        if [node for node, _ in left_over] != [node for node, (g, _) in everywhere if g == self.group.index]:
            raise ValueError(f"group {self.group.index} holds the tree nodes {held}, which do not match the lanes {ranges}")
        return FoldPlan(additions, [place for _, place in left_over], num_nodes, *tree_order.fold_all(everywhere, count))

    def _add_in_group(self, plan: FoldPlan, low: int, high: int) -> None:
        """Add the tree nodes of this group in the elements [low, high). If there is only one group, the last addition writes the
        total. Independent."""
        alone, total = len(self.group.members) == 1, self.buffer.total
        if alone and not plan.additions and plan.left_over[0] == (0, 0):
            return  # the sum is already in slot 0 of the first rank
        for start in range(low, high, CACHED):
            block = slice(start, min(start + CACHED, high))
            for i, ((r, j), (s, k)) in enumerate(plan.additions):
                into = self.buffer.parts[r][j, block]
                last = alone and i + 1 == len(plan.additions)
                torch.add(into, self.buffer.parts[s][k, block], out=total[block] if last else into)
            if alone and not plan.additions:
                r, j = plan.left_over[0]
                total[block] = self.buffer.parts[r][j, block]

    def _add_between_groups(self, plan: FoldPlan, start: int, stop: int) -> None:
        """Exchange the remaining tree nodes of all groups for the elements [start, stop). Sum this owner's range, and gather
        the sums. Collective over the rail (the owners of this slice)."""
        comm, wire, wait = self.group.rail, self.transport, self.wait
        bounds = slice_bounds(stop - start, comm.size)
        lengths = [high - low for low, high in zip(bounds, bounds[1:], strict=False)]
        low, high = bounds[comm.rank], bounds[comm.rank + 1]
        length = high - low
        mine = [wire.load(self.buffer.parts[r][k, start:stop], j) for j, (r, k) in enumerate(plan.left_over)]
        received: list[torch.Tensor] = []
        for j in range(max(plan.num_nodes)):
            sends = [n if j < len(mine) and g != comm.rank else 0 for g, n in enumerate(lengths)]
            receives = [length if j < plan.num_nodes[g] and g != comm.rank else 0 for g in range(comm.size)]
            received.append(wire.scratch(("received", j), comm.size * length).view(comm.size, length))
            source = mine[j] if j < len(mine) else mine[0]
            places = [g * length for g in range(comm.size)]
            wire.alltoallv(comm, wait, (source, sends, bounds[:-1]), (received[j], receives, places))

        def part(place: tuple[int, int]) -> torch.Tensor:
            g, j = place
            return mine[j][low:high] if g == comm.rank else received[j][g]

        for into, source_place in plan.program:
            target = part(into)
            target += part(source_place)  # in place, because neither tensor is needed again
        total = wire.load(self.buffer.total[start:stop], "total") if wire.mode == "host" else mine[0]
        if part(plan.sum_at).data_ptr() != total[low:high].data_ptr():
            total[low:high] = part(plan.sum_at)
        wire.ready()
        wire.allgatherv(comm, wait, (total, lengths, bounds[:-1]))
        wire.store(total, self.buffer.total[start:stop])


REDUCERS: dict[str, type[Reducer]] = {"tree": Tree, "allreduce": Allreduce, "naive": Naive, "root": Root}

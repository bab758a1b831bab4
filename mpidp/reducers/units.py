"""Units of the flat layout (mesh.shard=2|3). A unit is a group of parameters, for example those of a Transformer block or the
embedding (buckets.unit_of). The ranks exchange one unit at a time, and each rank owns one slice (range of elements) of every
unit.

Slices consist of whole norm blocks (4,096 elements), so each norm block has one owner. Offsets and ranges in this module are
relative to the start of the unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.checkpoint.boxes import boxes_of_run
from mpidp.checkpoint.entry import Entry
from mpidp.comm.slices import NORM_BLOCK, slice_bounds
from mpidp.comm.transport import Messages, allgather_ranges
from mpidp.comm.waiting import Wait
from mpidp.reducers.buckets import FlatLayout, unit_of


@dataclass(frozen=True)
class Channel:
    """How the ranks that share units exchange messages."""

    comm: MPI.Intracomm
    transport: Messages
    wait: Wait


@dataclass(frozen=True)
class Member:
    """A parameter of a unit."""

    name: str
    parameter: torch.nn.Parameter
    offset: int

    @property
    def range(self) -> range:
        """The elements of the parameter in the unit."""
        return range(self.offset, self.offset + self.parameter.numel())


@dataclass(frozen=True)
class Unit:
    """Consecutive parameters of the flat layout that are exchanged together."""

    index: int
    name: str
    start: int  # first element in the flat layout
    length: int  # number of elements, with padding
    members: tuple[Member, ...]
    parts: tuple[range, ...]  # the slice (range of elements) of each rank
    chunk: int  # the chunk of layers to which the unit belongs (mesh.interleave)

    def owned(self, member: Member, slice_: Tensor, rank: int) -> Tensor:
        """Return the elements of `member` that `rank` owns, as a view of `slice_`. slice_: the rank's slice of the unit. Pure."""
        run, start = self.run(member, rank), self.parts[rank].start
        return slice_[run.start - start : run.stop - start] if run else slice_[:0]

    def run(self, member: Member, rank: int) -> range:
        """Return the range of the elements of `member` that `rank` owns. It may be empty. Pure."""
        return overlap_of(member.range, self.parts[rank])

    def entries_of_run(self, member: Member, elements: Tensor, rank: int, key: str) -> dict[str, Entry]:
        """Return the checkpoint entries of a tensor of the shape of `member`, for the elements that `rank` owns. elements: the
        values of these elements, (run,). key: the tensor's name in the checkpoint. If there are no elements, return one empty
        entry. Pure."""
        shape, run = tuple(member.parameter.shape), self.run(member, rank)
        boxes = boxes_of_run(shape, run.start - member.offset, run.stop - member.offset)
        views = elements.split([torch.Size(size).numel() for _, size in boxes]) if boxes else [elements]
        return {
            f"{key}#{number}": Entry(view.view(size), "sharded", at, shape)
            for number, ((at, size), view) in enumerate(
                zip(boxes or [((0,) * len(shape), (0, *shape[1:]))], views, strict=True)
            )
        }

    def whole(self, member: Member, slice_: Tensor, channel: Channel) -> Tensor:
        """Gather a whole tensor of the shape of `member` from all ranks, and return it. slice_: this rank's slice of the unit,
        which contains this rank's elements of the tensor. Collective over channel.comm."""
        rank, found = channel.comm.rank, torch.empty(member.parameter.numel(), device=slice_.device)
        runs = [overlap_of(member.range, part) for part in self.parts]
        parts = [range(run.start - member.offset, run.stop - member.offset) for run in runs]
        found[parts[rank].start : parts[rank].stop] = self.owned(member, slice_, rank)
        allgather_ranges(channel.transport, channel.comm, channel.wait, found, parts)
        return found.view(member.parameter.shape)


def overlap_of(one: range, other: range) -> range:
    """Return the elements that both ranges contain, as a range. It may be empty. Both ranges have step 1. Pure."""
    low = max(one.start, other.start)
    return range(min(low, one.stop), max(min(low, one.stop), min(one.stop, other.stop)))


def units_of(layout: FlatLayout, size: int, chunk_of: Callable[[str], int], first: int = 0) -> list[Unit]:
    """Return the units of a flat layout, each cut into slices for `size` ranks. Units have the order of the layout, which is
    roughly the order of backward. chunk_of: returns the chunk of a parameter, given its name. first: index of the first unit.
    Pure."""
    groups = [list(group) for _, group in groupby(layout.placed(), key=lambda placed: unit_of(placed[1]))]
    starts = [group[0][0] for group in groups]
    found = []
    for index, (group, start, stop) in enumerate(zip(groups, starts, [*starts[1:], layout.num_elements], strict=True), first):
        name = group[0][1]
        members = tuple(Member(what, p, offset - start) for offset, what, p in group)
        bounds = slice_bounds(stop - start, size, NORM_BLOCK)
        parts = tuple(range(a, b) for a, b in zip(bounds, bounds[1:], strict=False))
        found.append(Unit(index, unit_of(name), start, stop - start, members, parts, chunk_of(name)))
    return found

"""The norm of a gradient that is divided among ranks (mesh.shard=2|3). It has the same bits as with mesh.shard=0.

The norm is summed over norm blocks, which have 4,096 elements. Without model.slices, one rank holds all elements of a norm
block. With model.slices, each slice of a parameter is cut into norm blocks, and several ranks can hold elements of one block.
Therefore each slice is first gathered on one rank. If the elements of a slice are not consecutive, the whole parameter is
gathered on one rank. Each element is sent to one rank only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.buffers import buf
from mpidp.comm.slices import NORM_BLOCK, norm_of_squares, round_up, squares_of_blocks
from mpidp.parallel.model_part import ModelPartition
from mpidp.parallel.sliced_norm import NormBySlices, squares_of_piece
from mpidp.reducers.buckets import FlatLayout
from mpidp.reducers.units import Channel, Member, Unit, overlap_of


class ShardedNorm:
    """Computes the L2 norm over the whole model."""

    def __init__(self, units: Sequence[Unit], layout: FlatLayout, channel: Channel, parts: ModelPartition | None) -> None:
        """`units`: all units (parameters that are exchanged together) of `layout`. `channel`: the ranks that share the units.
        `parts`: this rank's part of the model, if the model is divided."""
        self._units, self._layout, self._channel, self._parts = units, layout, channel, parts

    def __call__(self, totals: Sequence[Tensor]) -> float:
        """Return the norm. `totals`: the gradient sum of this rank's slice of each unit. Collective over channel.comm, and
        over the ranks of a replica."""
        rank, squares = self._channel.comm.rank, torch.zeros(self._layout.num_elements // NORM_BLOCK, dtype=torch.float64)
        for unit, total in zip(self._units, totals, strict=True):
            if total.numel():
                first = (unit.start + unit.parts[rank].start) // NORM_BLOCK
                squares[first : first + total.numel() // NORM_BLOCK] = squares_of_blocks(total).cpu()
        self._collect(squares)
        if self._parts is None:
            return norm_of_squares(squares)
        spans: dict[int, tuple[int, int]] = {}
        for unit in self._units:  # in flat order, the units of a chunk are consecutive
            spans[unit.chunk] = (spans.get(unit.chunk, (unit.start, 0))[0], unit.start + unit.length)
        uncounted = [
            unit.whole(member, total, self._channel)
            for unit, total in zip(self._units, totals, strict=True)
            for member in unit.members if not self._parts.counts(member.name)
        ]
        return self._parts.norm_of([spans[chunk] for chunk in sorted(spans)], squares, uncounted)

    def _collect(self, squares: Tensor) -> None:
        """Give every rank the values that all ranks have computed. Each value is 0 on all ranks except one. Collective over
        channel.comm."""
        with self._channel.transport.timed():
            self._channel.wait(self._channel.comm.Iallreduce(MPI.IN_PLACE, buf(squares)))


@dataclass(frozen=True)
class Section:
    """Consecutive elements of a unit that one rank gathers: a slice of a parameter, or a whole parameter."""

    elements: range
    shape: torch.Size
    cut: tuple[int, list[int]] | None  # how the gathered tensor is cut into slices
    blocks: range = range(0)  # the norm blocks, among all norm blocks of this part of the model
    owner: int = 0  # the rank that gathers the elements

    def pieces(self, flat: Tensor) -> Sequence[Tensor]:
        """Return the slices. `flat`: the elements, (n,). Pure."""
        whole = flat.view(self.shape)
        return [whole] if self.cut is None else whole.split(self.cut[1], self.cut[0])


class ShardedNormBySlices(ShardedNorm):
    """Computes the L2 norm of a model with model.slices (parallel/sliced_norm.py)."""

    def __init__(self, units: Sequence[Unit], layout: FlatLayout, channel: Channel, parts: ModelPartition) -> None:
        super().__init__(units, layout, channel, parts)
        self._parts: ModelPartition = parts
        assert parts.norm_by_slices is not None
        self._by_slices: NormBySlices = parts.norm_by_slices
        self._sections: list[list[Section]] = []  # of each unit
        load, self._num_blocks = [0] * channel.comm.size, 0
        for unit in units:
            self._sections.append([])
            for section in (one for member in unit.members for one in self._sections_of(member)):
                sizes = [piece.numel() for piece in section.pieces(torch.empty(len(section.elements), device="meta"))]
                first, owner = self._num_blocks, load.index(min(load))
                self._num_blocks += sum(round_up(size, NORM_BLOCK) for size in sizes) // NORM_BLOCK
                load[owner] += len(section.elements)
                self._sections[-1].append(replace(section, blocks=range(first, self._num_blocks), owner=owner))

    def _sections_of(self, member: Member) -> Iterator[Section]:
        shape, cut = member.parameter.shape, self._by_slices.cut(member.name)
        pieces = self._by_slices.pieces(member.name, torch.empty(shape, device="meta"))
        if cut is None or cut[0] != 0:
            if pieces:
                yield Section(member.range, shape, cut)
            return
        low = member.offset
        for piece in pieces:
            yield Section(range(low, low := low + piece.numel()), piece.shape, None)

    def __call__(self, totals: Sequence[Tensor]) -> float:
        squares = torch.zeros(self._num_blocks, dtype=torch.float64)
        for unit, sections, total in zip(self._units, self._sections, totals, strict=True):
            for section, flat in self._gather(unit, sections, total):
                of_pieces = [squares_of_piece(piece) for piece in section.pieces(flat)]
                squares[section.blocks.start : section.blocks.stop] = torch.cat(of_pieces).cpu()
        self._by_slices.mark(squares, [
            unit.owned(member, total, self._channel.comm.rank)
            for unit, total in zip(self._units, totals, strict=True)
            for member in unit.members if not self._parts.counts(member.name)
        ])
        self._collect(squares)
        return self._by_slices.of_squares(self._layout, squares)

    def _gather(self, unit: Unit, sections: Sequence[Section], total: Tensor) -> Iterator[tuple[Section, Tensor]]:
        """Yield (section, its elements) of this rank's sections of a unit. Collective over channel.comm."""
        comm, transport, rank = self._channel.comm, self._channel.transport, self._channel.comm.rank
        mine, part, others = [one for one in sections if one.owner == rank], unit.parts[rank], range(comm.size)
        sends = [[overlap_of(one.elements, part) for one in sections if one.owner == q != rank] for q in others]
        gets = [[overlap_of(one.elements, unit.parts[q]) for one in mine if q != rank] for q in others]
        lengths = [[sum(map(len, runs)) for runs in one] for one in (sends, gets)]
        starts = [[0, *accumulate(one)][:-1] for one in lengths]
        out, arrived = (transport.scratch(("norm", i), sum(one)) for i, one in enumerate(lengths))
        with transport.timed():
            runs = [run for of_rank in sends for run in of_rank]
            for run, to in zip(runs, out.split([len(run) for run in runs]) if runs else (), strict=True):
                to.copy_(total[run.start - part.start : run.stop - part.start])
            transport.ready()
            transport.alltoallv(comm, self._channel.wait, (out, lengths[0], starts[0]), (arrived, lengths[1], starts[1]))
        found, at = [torch.empty(len(one.elements), device=total.device) for one in mine], 0
        for q in others:
            for section, flat in zip(mine, found, strict=True):
                run = overlap_of(section.elements, unit.parts[q])
                to = flat[run.start - section.elements.start : run.stop - section.elements.start]
                if q == rank:
                    to.copy_(total[run.start - part.start : run.stop - part.start])
                else:
                    to.copy_(arrived[at : (at := at + len(run))])
        yield from zip(mine, found, strict=True)

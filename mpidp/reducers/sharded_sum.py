"""Sums the gradients of units over the ranks (mesh.shard=2|3). A unit is a group of parameters, such as those of a Transformer
block. Each rank owns one slice (range of elements) of every unit, and stores only the sums of its own slices.

In each round, every rank computes at most one micro-batch. A rank sends this micro-batch's gradient to the owners of the
slices, one unit at a time. After each unit, the rank frees the gradient of this unit. The owners add the gradients of a round
in the order of the tree (rounds.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpidp.comm.transport import PIECE_BYTES
from mpidp.data.lanes import Lanes
from mpidp.reducers.rounds import Place, plan_rounds, slots_of
from mpidp.reducers.units import Channel, Unit, overlap_of


class ShardedSum:
    """The gradient sums of this rank's slices."""

    def __init__(self, units: Sequence[Unit], lanes: Lanes, channel: Channel, device: torch.device) -> None:
        """device: the device of the gradients."""
        self._channel = channel
        self.rounds = plan_rounds(lanes, channel.comm.size)
        rank, slots = channel.comm.rank, slots_of(self.rounds)
        self.slots = [torch.zeros(slots, len(unit.parts[rank]), device=device) for unit in units]
        self.totals = [slots[0] for slots in self.slots]  # the sum of each unit's slice, after the last round
        self._round, self._packed = [0 for _ in units], torch.empty(0, device=device)

    def discard(self) -> None:
        """Discard the gradients of the current step. Independent."""
        self._round = [0 for _ in self.slots]

    def reduce(self, unit: Unit) -> None:
        """Sum the gradients of `unit` in this round, and free them. A missing gradient counts as zero. Collective over
        channel.comm."""
        now = self.rounds[self._round[unit.index]]
        self._round[unit.index] += 1
        gradients = []
        for member in unit.members:
            if member.parameter.grad is not None:
                gradients.append((member.range, member.parameter.grad.reshape(-1)))
                member.parameter.grad = None
        comm, transport, slots = self._channel.comm, self._channel.transport, self.slots[unit.index]
        rank, size = comm.rank, comm.size
        step = max(1, PIECE_BYTES // 4 // size)
        places = [q * step for q in range(size)]
        with transport.timed():
            for low in range(0, max(map(len, unit.parts)), step):
                parts = [part[low : low + step] for part in unit.parts]
                packed = self._scratch(step * size)
                for part, place in zip(parts, places, strict=True):
                    if rank < now.rows:
                        pack(packed[place : place + len(part)], part, gradients)
                mine = len(parts[rank])
                sends = [len(part) if q != rank and rank < now.rows else 0 for q, part in enumerate(parts)]
                receives = [mine if q != rank and q < now.rows else 0 for q in range(size)]
                received = transport.scratch("received gradients", step * size)
                wire = transport.load(packed, "gradients")
                transport.alltoallv(comm, self._channel.wait, (wire, sends, places), (received, receives, places))
                arrived = received.to(packed.device)
                rows = [(packed if q == rank else arrived)[place : place + mine] for q, place in enumerate(places)]
                self._add(now.additions, now.kept, rows, slots[:, low : low + mine])

    def _add(
        self, additions: Sequence[tuple[Place, Place]], kept: Sequence[tuple[int, int]], rows: list[Tensor], slots: Tensor
    ) -> None:
        held: dict[str, Sequence[Tensor]] = {"row": rows, "slot": slots.unbind()}
        for (kind, number), (other, source) in additions:
            held[kind][number].add_(held[other][source])
        for slot, row in kept:
            slots[slot].copy_(rows[row])

    def _scratch(self, elements: int) -> Tensor:
        """Return a tensor (elements,) on the gradients' device. The next call reuses its memory."""
        if self._packed.numel() < elements:
            self._packed = torch.empty(elements, device=self._packed.device)
        return self._packed[:elements]


def pack(out: Tensor, part: range, gradients: Sequence[tuple[range, Tensor]]) -> None:
    """Write the elements of a unit's gradient in the range `part` to `out`. gradients: a list of (range of elements, values of
    these elements). Elements outside these ranges become 0. Values of -0.0 become 0.0, as with mesh.shard=0. Independent."""
    out.zero_()
    for where, values in gradients:
        both = overlap_of(where, part)
        if both:
            out[both.start - part.start : both.stop - part.start] += values[both.start - where.start : both.stop - where.start]

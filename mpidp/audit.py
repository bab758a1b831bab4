"""Do the replicas still hold the same bits, and does every rank compute what another would? Memory and cores fail silently.

Every `every` steps two things are looked at. *Weights*: replicas compare checksums of parameters and optimizer state, tensor by
tensor; one that differs from a majority is overwritten from it, and where there is none the run goes back to its last
checkpoint, before which weights were compared too. *Computing*: of every rank one lane is computed a second time by another
rank, in rotation, before the gradients are added; the two must agree bit for bit, else the step is done again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.buckets import FlatLayout, GradientBuffer
from mpidp.comm.buffers import buf
from mpidp.comm.transport import pieces


def checksum(tensor: Tensor) -> int:
    """The sum of its float32 as integers, modulo 2^64: any one flipped bit changes it, the order of addition does not.
    Independent."""
    return int(tensor.reshape(-1).view(torch.int32).sum(dtype=torch.int64))


def vote(rows: Sequence[tuple[int, ...]]) -> tuple[int | None, list[int]]:
    """(a row that more than half agree with, those that differ from it); (None, all) when there is no majority. Pure."""
    row, count = Counter(rows).most_common(1)[0]
    if 2 * count <= len(rows):
        return None, list(range(len(rows)))
    return rows.index(row), [i for i, other in enumerate(rows) if other != row]


def suspects(disagreements: Sequence[tuple[int, int]]) -> list[int]:
    """The ranks that most pairs which disagree have in common: with three ranks or more each is in two pairs, so one that
    computes wrongly stands out. Pure."""
    seen = Counter(rank for pair in disagreements for rank in set(pair))
    return sorted(rank for rank, count in seen.items() if count == max(seen.values()))


class Aside:
    """What the engine sees of a strategy when a lane is computed for comparison only: gradients go to a spare slot."""

    def __init__(self, buffer: GradientBuffer, slot: int) -> None:
        self._buffer, self._slot = buffer, slot
        self.gradient = buffer.flat[slot]
        self.gradient.zero_()

    @contextmanager
    def micro_batch(self, v: int, last: bool) -> Iterator[None]:
        """Backward of micro-batch v runs inside. Independent."""
        self._buffer.point(self._slot)
        yield


@dataclass
class Finding:
    """What an audit found: the same on every rank."""

    ranks: list[int]  # whose bits differ, or all that may be wrong
    what: str
    repaired: bool


class Audit:
    """The bookkeeping of audits; who computes and who is asked is fit's business."""

    def __init__(
        self, comm: MPI.Intracomm, every: int, replicas: list[range], buffer: GradientBuffer, flats: dict[str, Tensor]
    ) -> None:
        """every: 0 for never. replicas: the ranks that hold each copy of the flat tensors, named after what they hold."""
        self.comm, self.every, self.replicas, self.buffer = comm, every, replicas, buffer
        self._flats = flats
        self._lanes: dict[int, int] = {}  # audited in this step -> whose they are by rights
        self._table = np.zeros((3, comm.size), dtype=np.int64)

    def due(self, step: int) -> bool:
        """Is this step audited? Independent."""
        return bool(self.every) and step % self.every == 0

    # Computing -----------------------------------------------------------------------------------------------------------

    def begin(self, step: int, ranges: Sequence[range]) -> tuple[int, list[int]]:
        """A step's audit begins: (lane that this rank computes a second time, all lanes looked at). Independent."""
        size, round_ = self.comm.size, step // self.every
        # Not half way round: there the same two would check each other twice, and which of them is wrong would not show.
        offsets = [offset for offset in range(1, size) if 2 * offset != size] or [1]
        offset = offsets[round_ % len(offsets)]
        of_rank = [lanes[round_ % len(lanes)] for lanes in ranges]
        self._lanes = {lane: rank for rank, lane in enumerate(of_rank)}
        self._table[:] = 0
        return of_rank[(self.comm.rank - offset) % size], of_rank

    def look(self, lane: int, gradient: Tensor) -> None:
        """This rank has computed a lane in the ordinary way. Independent."""
        if lane in self._lanes:
            self._table[0, self._lanes[lane]] = checksum(gradient)
            self._table[2, self._lanes[lane]] += self.comm.rank

    def compare(self, lane: int, gradient: Tensor) -> Finding | None:
        """This rank has computed a lane a second time: do all pairs agree? Collective over comm."""
        whose = self._lanes[lane]
        self._table[1, whose] = checksum(gradient)
        again = np.zeros(self.comm.size, dtype=np.int64)
        again[whose] = self.comm.rank
        self.comm.Allreduce(MPI.IN_PLACE, self._table)
        self.comm.Allreduce(MPI.IN_PLACE, again)
        first, second, by = self._table.tolist()
        lane_of = {rank: lane for lane, rank in self._lanes.items()}
        wrong = [r for r in range(self.comm.size) if first[r] != second[r]]
        if not wrong:
            return None
        ranks = suspects([(by[r], int(again[r])) for r in wrong])
        pairs = ", ".join(f"lane {lane_of[r]} (rank {by[r]} and rank {int(again[r])})" for r in wrong)
        return Finding(ranks, f"two computations of one lane differ: {pairs}", repaired=False)

    # Weights -------------------------------------------------------------------------------------------------------------

    def weights(self) -> Finding | None:
        """Compare the replicas, and repair what a majority knows better. Collective over comm."""
        layout: FlatLayout = self.buffer.layout
        names = [f"{name}{suffix}" for suffix in self._flats for _, name, _ in layout.placed()]
        row = np.array([checksum(view) for flat in self._flats.values() for view in layout.views(flat)], dtype=np.int64)
        table = np.empty((self.comm.size, len(row)), dtype=np.int64)
        self.comm.Allgather(row, table)
        speak = [members[0] for members in self.replicas]  # ranks that share a copy all see the same
        rows = [tuple(table[rank].tolist()) for rank in speak]
        good, bad = vote(rows)
        if not bad:
            return None
        base = rows[good if good is not None else 0]
        different = [names[i] for i in range(len(row)) if any(rows[b][i] != base[i] for b in bad)]
        what = f"{different[0]}" + (f" and {len(different) - 1} more tensors" if len(different) > 1 else "") + " differs"
        ranks = [rank for b in bad for rank in self.replicas[b]]
        if good is None:
            return Finding(ranks, f"{what} between replicas, and there is no majority", repaired=False)
        for flat in self._flats.values():
            wire = flat.cpu()
            for start, stop in pieces(0, wire.numel()):
                self.comm.Bcast(buf(wire[start:stop]), root=speak[good])
            flat.copy_(wire)
        return Finding(ranks, f"{what} from the majority's", repaired=True)

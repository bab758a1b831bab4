"""Do the replicas still hold the same bits, and does every rank compute what another would? Memory and cores fail silently.

Every `every` steps two things are looked at. *Weights*: replicas compare checksums of parameters and optimizer state, tensor by
tensor; one that differs from a majority is overwritten from it, and where there is none the run goes back to its last
checkpoint, before which weights were compared too. *Computing*: of every rank one lane is computed a second time by another
rank, in rotation, before the gradients are added; the two must agree bit for bit, else the step is done again.

On a mesh each part of the model is compared with the same part of the other replicas. What every rank of a stage has (gains of
norms) is compared between these, too: where replicas know no better, the run goes back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.buffers import buf
from mpidp.comm.transport import pieces
from mpidp.parallel.grid import Grid
from mpidp.reducers.buckets import FlatLayout, GradientBuffer


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


class SpareSlot:
    """What the engine sees of a strategy when a lane is computed for comparison only: gradients go to a spare slot."""

    def __init__(self, buffer: GradientBuffer, slot: int) -> None:
        self._buffer, self._slot = buffer, slot
        self.gradient = buffer.flat[slot]
        self.gradient.zero_()

    @contextmanager
    def micro_batch(self, v: int, last: bool, chunk: int = 0) -> Iterator[None]:
        """Backward of micro-batch v runs inside. Independent."""
        self._buffer.point(self._slot)
        yield


@dataclass
class AuditFinding:
    """What an audit found: the same on every rank."""

    ranks: list[int]  # whose bits differ, or all that may be wrong
    what: str
    repaired: bool


class Audit:
    """The bookkeeping of audits; who computes and who is asked is fit's business."""

    def __init__(
        self, grid: Grid, every: int, replicas: list[range], buffer: GradientBuffer, flats: dict[str, Tensor],
        is_cut: Callable[[str], bool],
    ) -> None:
        """every: 0 for never. replicas: the ranks that hold each copy of the flat tensors, named after what they hold.
        is_cut: has each rank of a stage another part of this parameter?"""
        self.comm, self.every, self.replicas, self.buffer = grid.replicas.dp, every, replicas, buffer
        self._flats, self._grid, self._is_cut = flats, grid, is_cut
        self._lanes: dict[int, int] = {}  # audited in this step -> whose they are by rights
        self._table = np.zeros((3, self.comm.size), dtype=np.int64)

    def _rank(self, replica: int) -> int:
        """In the whole job, of who has this rank's part in another replica. Independent."""
        return replica * self._grid.parts + self._grid.model.rank

    def _told(self, *mine: AuditFinding | None) -> AuditFinding | None:
        """What any rank found: the same on every rank. Collective over the job's ranks."""
        found = [finding for finding in mine if finding is not None]
        if self._grid.parts == 1:  # all have compared the same
            return found[0] if found else None
        any_found = np.array([len(found)])
        self._grid.world.Allreduce(MPI.IN_PLACE, any_found)
        if not any_found[0]:
            return None
        told = [one for some in self._grid.world.allgather(found) for one in some]
        ranks = sorted({rank for one in told for rank in one.ranks})
        return AuditFinding(ranks, "; ".join(dict.fromkeys(one.what for one in told)), all(one.repaired for one in told))

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

    def record(self, lane: int, gradient: Tensor) -> None:
        """This rank has computed a lane in the ordinary way. Independent."""
        if lane in self._lanes:
            self._table[0, self._lanes[lane]] = checksum(gradient)
            self._table[2, self._lanes[lane]] += self.comm.rank

    def compare(self, lane: int, gradient: Tensor) -> AuditFinding | None:
        """This rank has computed a lane a second time: do all pairs agree? Collective over the job's ranks."""
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
            return self._told()
        ranks = [self._rank(r) for r in suspects([(by[r], int(again[r])) for r in wrong])]
        pairs = ", ".join(f"lane {lane_of[r]} (rank {self._rank(by[r])} and rank {self._rank(int(again[r]))})" for r in wrong)
        return self._told(AuditFinding(ranks, f"two computations of one lane differ: {pairs}", repaired=False))

    # Weights -------------------------------------------------------------------------------------------------------------

    def weights(self) -> AuditFinding | None:
        """Compare the replicas, and repair what a majority knows better. Collective over the job's ranks."""
        return self._told(self._between_replicas(), self._within_stage())

    def _views(self) -> dict[str, Tensor]:
        """Of every parameter and what belongs to it, by name. Independent."""
        layout: FlatLayout = self.buffer.layout
        return {
            f"{name}{suffix}": view for suffix, flat in self._flats.items()
            for (_, name, _), view in zip(layout.placed(), layout.views(flat), strict=True)
        }

    def _between_replicas(self) -> AuditFinding | None:
        views = self._views()
        speak = [members[0] for members in self.replicas]  # ranks that share a copy all see the same
        good, bad, what = _compare(self.comm, views, speak)
        if not bad:
            return None
        ranks = [self._rank(rank) for b in bad for rank in self.replicas[b]]
        if good is None:
            return AuditFinding(ranks, f"{what} between replicas, and there is no majority", repaired=False)
        for flat in self._flats.values():
            wire = flat.cpu()
            for start, stop in pieces(0, wire.numel()):
                self.comm.Bcast(buf(wire[start:stop]), root=speak[good])
            flat.copy_(wire)
        return AuditFinding(ranks, f"{what} from the majority's", repaired=True)

    def _within_stage(self) -> AuditFinding | None:
        tp = self._grid.tp
        if tp.size == 1:
            return None
        whole = {name: view for name, view in self._views().items() if not self._is_cut(name.partition("/")[0])}
        _, bad, what = _compare(tp, whole, range(tp.size))
        first = self._grid.world.rank - tp.rank
        return AuditFinding([first + b for b in bad], f"{what} between the ranks of a stage", repaired=False) if bad else None


def _compare(comm: MPI.Intracomm, views: Mapping[str, Tensor], speak: Sequence[int]) -> tuple[int | None, list[int], str]:
    """(whose are right, whose are not, of those who speak; words), as vote has it. Collective over comm."""
    row = np.array([checksum(view) for view in views.values()], dtype=np.int64)
    table = np.empty((comm.size, len(row)), dtype=np.int64)
    comm.Allgather(row, table)
    rows = [tuple(table[rank].tolist()) for rank in speak]
    good, bad = vote(rows)
    base = rows[good if good is not None else 0]
    different = [name for i, name in enumerate(views) if any(rows[b][i] != base[i] for b in bad)]
    more = f" and {len(different) - 1} more tensors" if len(different) > 1 else ""
    return good, bad, f"{different[0]}{more} differs" if different else ""

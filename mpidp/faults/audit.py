"""Audits detect silent hardware errors in memory and in processor cores.

An audit takes place every train.audit_every steps. It checks two things. *Weights*: replicas compare checksums of parameters
and optimizer state, tensor by tensor. A replica that differs from the majority is overwritten with the majority's state.
Without a majority, the run returns to its last checkpoint. This checkpoint is reliable, because weights are also compared
before they are saved. *Computation*: before gradients are reduced, one lane (a fixed sequence of micro-batches) of each rank
is computed a second time by another rank. Where possible, the lanes and the pairs of ranks change from one audit to the next.
If the two results of a lane are not bit-identical, the step is repeated.

On a mesh, each part of the model is compared with the same part of the other replicas. Some parameters, such as the gains of
norms, are stored by each rank of a pipeline stage. These parameters are also compared between the ranks of the stage. If
parameters differ only within a stage, the run returns to its last checkpoint.
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
    """Return a checksum of a float32 tensor. The 32 bits of each value are read as an integer. The checksum is the sum of these
    integers modulo 2^64, so the order of addition does not matter. Flipping one bit always changes the checksum. Independent."""
    return int(tensor.reshape(-1).view(torch.int32).sum(dtype=torch.int64))


def vote(rows: Sequence[tuple[int, ...]]) -> tuple[int | None, list[int]]:
    """Find the row to which more than half of `rows` are equal. Return (index of this row, indices of the rows that differ from
    it). If there is no such row, return (None, all indices). Pure."""
    row, count = Counter(rows).most_common(1)[0]
    if 2 * count <= len(rows):
        return None, list(range(len(rows)))
    return rows.index(row), [i for i, other in enumerate(rows) if other != row]


def suspects(disagreements: Sequence[tuple[int, int]]) -> list[int]:
    """Return the ranks that occur in the most pairs of `disagreements`. Each pair consists of two ranks that computed the same
    lane (sequence of micro-batches) with different results. With three or more ranks, each rank is in two of the compared
    pairs. A rank that computes wrong results therefore occurs more often than other ranks. Pure."""
    seen = Counter(rank for pair in disagreements for rank in set(pair))
    return sorted(rank for rank, count in seen.items() if count == max(seen.values()))


class SpareSlot:
    """Takes the place of the strategy while a rank computes a lane (sequence of micro-batches) only for comparison. Gradients
    are written to a spare slot, which is a flat gradient buffer."""

    def __init__(self, buffer: GradientBuffer, slot: int) -> None:
        self._buffer, self._slot = buffer, slot
        self.gradient = buffer.flat[slot]
        self.gradient.zero_()

    @contextmanager
    def micro_batch(self, v: int, last: bool, chunk: int = 0) -> Iterator[None]:
        """Return a context for the backward pass of a micro-batch. In this context, gradients are written to the spare slot.
        Independent."""
        self._buffer.point(self._slot)
        yield


@dataclass
class AuditFinding:
    """An error that an audit found. All ranks have equal findings."""

    ranks: list[int]  # ranks whose bits differ from the majority, or all ranks that may be wrong
    what: str  # description for the user
    repaired: bool  # whether the majority's state was copied to these ranks


class Audit:
    """Chooses the lanes (sequences of micro-batches) to audit, and compares the results. training/step.py runs the
    computations."""

    def __init__(
        self, grid: Grid, every: int, replicas: list[range], buffer: GradientBuffer, flats: dict[str, Tensor],
        is_cut: Callable[[str], bool],
    ) -> None:
        """`every`: number of steps from one audit to the next, or 0 for no audits. `replicas`: for each replica, the ranks that
        share its flat tensors. `flats`: {suffix: flat tensor} of the parameters and the optimizer state. In messages, the suffix
        follows a parameter's name. `is_cut`: a function that gets a parameter's name, and returns whether the ranks of a stage
        divide this parameter."""
        self.comm, self.every, self.replicas, self.buffer = grid.replicas.dp, every, replicas, buffer
        self._flats, self._grid, self._is_cut = flats, grid, is_cut
        self._lanes: dict[int, int] = {}  # {lane audited in this step: the rank to which the lane is assigned}
        self._table = np.zeros((3, self.comm.size), dtype=np.int64)

    def _rank(self, replica: int) -> int:
        """Return the rank of the job that holds, in replica number `replica`, the same part of the model as this rank.
        Independent."""
        return replica * self._grid.parts + self._grid.model.rank

    def _combine(self, *own: AuditFinding | None) -> AuditFinding | None:
        """Combine the findings of all ranks into one, and return it on all ranks. Return None if there are no findings.
        Collective over the job's ranks."""
        found = [finding for finding in own if finding is not None]
        if self._grid.parts == 1:  # without a mesh, all ranks have the same result
            return found[0] if found else None
        any_found = np.array([len(found)])
        self._grid.world.Allreduce(MPI.IN_PLACE, any_found)
        if not any_found[0]:
            return None
        findings = [one for some in self._grid.world.allgather(found) for one in some]
        ranks = sorted({rank for one in findings for rank in one.ranks})
        return AuditFinding(ranks, "; ".join(dict.fromkeys(one.what for one in findings)), all(one.repaired for one in findings))

    def due(self, step: int) -> bool:
        """Return whether this step is audited. Independent."""
        return bool(self.every) and step % self.every == 0

    # Computing -----------------------------------------------------------------------------------------------------------

    def begin(self, step: int, ranges: Sequence[range]) -> tuple[int, list[int]]:
        """Begin the audit of a step. Return (the lane that this rank computes a second time, all audited lanes). A lane is a
        sequence of micro-batches. `ranges`: the lanes of each rank. Independent."""
        size, round_ = self.comm.size, step // self.every
        # Each rank checks the rank that is `offset` ranks before it. The offset size / 2 is skipped, because the two ranks of
        # a pair would then check only each other. A difference would not show which of the two is wrong.
        offsets = [offset for offset in range(1, size) if 2 * offset != size] or [1]
        offset = offsets[round_ % len(offsets)]
        of_rank = [lanes[round_ % len(lanes)] for lanes in ranges]
        self._lanes = {lane: rank for rank, lane in enumerate(of_rank)}
        self._table[:] = 0
        return of_rank[(self.comm.rank - offset) % size], of_rank

    def record(self, lane: int, gradient: Tensor) -> None:
        """Record the checksum of `gradient`, the gradient of a lane (sequence of micro-batches) that this rank computed in the
        step. If the lane is not audited, do nothing. Independent."""
        if lane in self._lanes:
            self._table[0, self._lanes[lane]] = checksum(gradient)
            self._table[2, self._lanes[lane]] += self.comm.rank

    def compare(self, lane: int, gradient: Tensor) -> AuditFinding | None:
        """Compare the two computations of each audited lane (sequence of micro-batches), on all ranks. Return the finding, or
        None if there is no difference. `lane`: the lane that this rank computed a second time. `gradient`: the gradient of
        this second computation. Collective over the job's ranks."""
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
            return self._combine()
        ranks = [self._rank(r) for r in suspects([(by[r], int(again[r])) for r in wrong])]
        pairs = ", ".join(f"lane {lane_of[r]} (rank {self._rank(by[r])} and rank {self._rank(int(again[r]))})" for r in wrong)
        return self._combine(AuditFinding(
            ranks, f"two computations of one lane (a sequence of micro-batches) differ: {pairs}", repaired=False,
        ))

    # Weights -------------------------------------------------------------------------------------------------------------

    def weights(self) -> AuditFinding | None:
        """Compare the replicas, and repair the replicas that differ from the majority. Return the finding, or None if there is
        no difference. Collective over the job's ranks."""
        return self._combine(self._between_replicas(), self._within_stage())

    def _views(self) -> dict[str, Tensor]:
        """Return views of all parameters and of their optimizer state, by name. Independent."""
        layout: FlatLayout = self.buffer.layout
        return {
            f"{name}{suffix}": view for suffix, flat in self._flats.items()
            for (_, name, _), view in zip(layout.placed(), layout.views(flat), strict=True)
        }

    def _between_replicas(self) -> AuditFinding | None:
        views = self._views()
        first_ranks = [members[0] for members in self.replicas]  # ranks that share flat tensors read the same memory
        good, bad, what = _compare(self.comm, views, first_ranks)
        if not bad:
            return None
        ranks = [self._rank(rank) for b in bad for rank in self.replicas[b]]
        if good is None:
            return AuditFinding(ranks, f"{what} between replicas, without a majority", repaired=False)
        for flat in self._flats.values():
            wire = flat.cpu()
            for start, stop in pieces(0, wire.numel()):
                self.comm.Bcast(buf(wire[start:stop]), root=first_ranks[good])
            flat.copy_(wire)
        return AuditFinding(ranks, f"{what} from the majority of the replicas", repaired=True)

    def _within_stage(self) -> AuditFinding | None:
        tp = self._grid.tp
        if tp.size == 1:
            return None
        whole = {name: view for name, view in self._views().items() if not self._is_cut(name.partition("/")[0])}
        _, bad, what = _compare(tp, whole, range(tp.size))
        first = self._grid.world.rank - tp.rank
        return AuditFinding([first + b for b in bad], f"{what} between the ranks of a stage", repaired=False) if bad else None


def _compare(comm: MPI.Intracomm, views: Mapping[str, Tensor], ranks: Sequence[int]) -> tuple[int | None, list[int], str]:
    """Compare the checksums of `views`, {name: tensor}, between `ranks`. Return (good, bad, what). `good`: the index in
    `ranks` of a rank of the majority, or None without a majority. `bad`: the indices in `ranks` of the ranks that differ from
    the majority. `what`: a description of the difference, or "". Collective over comm."""
    row = np.array([checksum(view) for view in views.values()], dtype=np.int64)
    table = np.empty((comm.size, len(row)), dtype=np.int64)
    comm.Allgather(row, table)
    rows = [tuple(table[rank].tolist()) for rank in ranks]
    good, bad = vote(rows)
    base = rows[good if good is not None else 0]
    different = [name for i, name in enumerate(views) if any(rows[b][i] != base[i] for b in bad)]
    more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
    return good, bad, f"{different[0]}{more} differs" if different else ""

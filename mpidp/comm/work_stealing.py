"""Work stealing within a node: a rank that is done takes lanes of one that is not, by counting in shared memory.

A rank's range of lanes is a row that it eats from the left while thieves eat from the right. Two counters of a range make
that safe without a lock: `claimed` counts permissions, and who draws one below the length of the range may take one more
lane of it; `stolen` counts thieves, and the s-th takes the s-th lane from the right. Permissions are counted together, so
left and right never meet and no lane is taken twice or left over, however late anyone is.

All access is by MPI_Fetch_and_op in one long epoch: on shared memory it needs no help from the rank that owns the counter
(it may be asleep), and no loads and stores of our own means no question of when they are seen. Open MPI: choose the
component for shared memory, OMPI_MCA_osc=^ucx, before MPI starts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

CLAIMED, STOLEN = 0, 1
COUNTERS = 2  # of a range, in one set
COUNTER_BYTES = 8  # int64


class Tickets:
    """Who takes which lane of this node next. Independent, but for making and closing it.

    Between two calls of begin() all ranks of the node must synchronize (a barrier, an allreduce), after the last next_own() and
    steal() of one step and before the first of the next. A training step has such a point.
    """

    def __init__(self, node: MPI.Intracomm) -> None:
        """node: ranks that share memory; ranges are counted in the order of its ranks. Collective over node."""
        self.size = node.size
        self._me = node.rank
        self._node = node
        self._ranges: Sequence[range] = [range(0)] * node.size
        self._taken = 0  # of the own range, from the left
        self._set = 0  # two sets take turns: one is in use while the other is zeroed
        self._given, self._found = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        self._win = MPI.Win.Allocate_shared(2 * COUNTERS * COUNTER_BYTES, COUNTER_BYTES, comm=node)
        self._win.Lock_all(MPI.MODE_NOCHECK)  # once: a lock and an unlock a call can take seconds
        for used in (0, 1):
            self._zero(used)
        node.Barrier()

    def begin(self, ranges: Sequence[range]) -> None:
        """A new step, in which rank i of the node owns the lanes ranges[i]: the same on all its ranks, which all call it.
        ValueError unless there is one range a rank."""
        if len(ranges) != self.size:
            raise ValueError(f"{len(ranges)} ranges of lanes for {self.size} ranks of a node")
        self._ranges, self._taken = ranges, 0
        self._set ^= 1
        self._zero(self._set ^ 1)  # of the step before, which all have left

    def next_own(self) -> int | None:
        """The next lane of the own range; None when all are taken."""
        if not self._permitted(self._me):
            return None
        self._taken += 1
        return self._ranges[self._me][self._taken - 1]

    def steal(self) -> int | None:
        """A lane of the rank that has most left; None when no rank has any left."""
        while True:
            left = [len(lanes) - self._draw(rank, CLAIMED, 0, MPI.NO_OP) for rank, lanes in enumerate(self._ranges)]
            victim = max(range(self.size), key=left.__getitem__)
            if left[victim] <= 0:
                return None
            if self._permitted(victim):  # else others were quicker: each such round leaves fewer
                return self._ranges[victim][-1 - self._draw(victim, STOLEN, 1, MPI.SUM)]

    def close(self) -> None:
        """Give the memory back. Only where every rank comes here: not on the way out of an error. Collective over node."""
        self._win.Unlock_all()
        self._win.Free()

    def _permitted(self, rank: int) -> bool:
        return self._draw(rank, CLAIMED, 1, MPI.SUM) < len(self._ranges[rank])

    def _zero(self, used: int) -> None:
        for counter in (CLAIMED, STOLEN):
            self._draw(self._me, counter, 0, MPI.REPLACE, used)

    def _draw(self, rank: int, counter: int, value: int, op: MPI.Op, used: int | None = None) -> int:
        """What a rank's counter was before the operation, which is done when this returns."""
        self._given[0] = value
        place = COUNTERS * (self._set if used is None else used) + counter
        self._win.Fetch_and_op([self._given, MPI.INT64_T], [self._found, MPI.INT64_T], rank, place, op)
        self._win.Flush(rank)
        return int(self._found[0])

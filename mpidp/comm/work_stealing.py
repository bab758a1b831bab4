"""Work stealing within a node. A lane is a fixed sequence of micro-batches. A rank that has finished its own lanes takes lanes
of other ranks. Counters in shared memory ensure that no two ranks take the same lane.

Each rank owns a range of lanes. A rank takes lanes of its own range from the left. Other ranks take lanes of this range from the
right. Two counters per range make work stealing safe without a lock. Every rank that wants a lane of a range first increments the
range's counter `claimed`. If the previous value is less than the length of the range, the rank may take one lane. If the range
belongs to another rank, the rank then increments the range's counter `stolen`. If the previous value is s, the rank takes lane s
from the right, counted from 0. Therefore every lane is taken exactly once, whatever the delays.

The counters are accessed only with MPI_Fetch_and_op, so MPI ensures that all ranks see the current values. In shared memory,
access usually succeeds even if the rank that owns the counter makes no MPI call. With MPICH 4 it may not succeed. steals_freely()
tests this. With Open MPI, set OMPI_MCA_osc=^ucx before MPI starts, so that Open MPI uses its shared-memory component.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
from mpi4py import MPI

CLAIMED, STOLEN = 0, 1
COUNTERS = 2  # number of counters per range, in one set
COUNTER_BYTES = 8  # int64
SLEEP_SECONDS = 1.0  # the longest time for which steals_freely() makes no MPI call on rank 0


class Tickets:
    """Assigns the lanes (sequences of micro-batches) of this node to the ranks of the node. Independent, except for the
    constructor and close().

    All ranks of the node must synchronize between two steps: after their last call of next_own() or steal() in a step, and before
    their first call in the next step. The allreduce in every training step synchronizes them.
    """

    def __init__(self, node: MPI.Intracomm) -> None:
        """`node`: the communicator of the ranks that share memory. Collective over node."""
        self.size = node.size
        self._me = node.rank
        self._node = node
        self._ranges: Sequence[range] = [range(0)] * node.size
        self._taken = 0  # lanes taken from this rank's range, from the left
        self._set = 0  # two sets alternate: one is in use while the other is zeroed
        self._given, self._found = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        self._win = MPI.Win.Allocate_shared(2 * COUNTERS * COUNTER_BYTES, COUNTER_BYTES, comm=node)
        self._win.Lock_all(MPI.MODE_NOCHECK)  # lock once, because locking and unlocking in each call can take seconds
        for used in (0, 1):
            self._zero(used)
        node.Barrier()

    def begin(self, ranges: Sequence[range]) -> None:
        """Begin a step. `ranges`: the range of lanes (sequences of micro-batches) that each rank of the node owns, in order of
        ranks. All ranks must call this method with the same `ranges`. Raises ValueError unless there is one range per rank."""
        if len(ranges) != self.size:
            raise ValueError(f"this node has {self.size} ranks, but begin() got {len(ranges)} ranges of lanes. Pass one per rank")
        self._ranges, self._taken = ranges, 0
        self._set ^= 1
        self._zero(self._set ^ 1)  # the previous step's set, which is no longer in use

    def next_own(self) -> int | None:
        """Take and return the next lane of this rank's range. Return None if all lanes of the range are taken."""
        if not self._permitted(self._me):
            return None
        self._taken += 1
        return self._ranges[self._me][self._taken - 1]

    def steal(self) -> int | None:
        """Take and return a lane from the rank that has the most lanes left. Return None if no rank has lanes left."""
        while True:
            left = [len(lanes) - self._draw(rank, CLAIMED, 0, MPI.NO_OP) for rank, lanes in enumerate(self._ranges)]
            victim = max(range(self.size), key=left.__getitem__)
            if left[victim] <= 0:
                return None
            if self._permitted(victim):  # otherwise another rank has taken the lane: try again
                return self._ranges[victim][-1 - self._draw(victim, STOLEN, 1, MPI.SUM)]

    def close(self) -> None:
        """Free the shared memory. This method waits for all ranks, so do not call it after an error that only some of the ranks
        have. Collective over node."""
        self._win.Unlock_all()
        self._win.Free()

    def _permitted(self, rank: int) -> bool:
        return self._draw(rank, CLAIMED, 1, MPI.SUM) < len(self._ranges[rank])

    def _zero(self, used: int) -> None:
        for counter in (CLAIMED, STOLEN):
            self._draw(self._me, counter, 0, MPI.REPLACE, used)

    def _draw(self, rank: int, counter: int, value: int, op: MPI.Op, used: int | None = None) -> int:
        """Apply `op` with `value` to a counter of `rank`, and return the counter's previous value. `counter`: CLAIMED or STOLEN.
        `used`: the set of counters, 0 or 1 (default: the set of this step)."""
        self._given[0] = value
        place = COUNTERS * (self._set if used is None else used) + counter
        self._win.Fetch_and_op([self._given, MPI.INT64_T], [self._found, MPI.INT64_T], rank, place, op)
        self._win.Flush(rank)
        return int(self._found[0])


def steals_freely(comm: MPI.Intracomm) -> bool:
    """Return True if a rank can take a lane of another rank while the other rank makes no MPI call. The test takes milliseconds
    if the result is True, and SLEEP_SECONDS if it is False. `comm`: the ranks of this node. Collective over comm."""
    flag = MPI.Win.Allocate_shared(COUNTER_BYTES * (comm.rank == 0), COUNTER_BYTES, comm=comm)
    memory: Any = flag.Shared_query(0)[0]
    drawn = np.frombuffer(memory, dtype=np.int64)  # set by rank 1, without MPI
    drawn[0] = 0
    free = True
    with closing(Tickets(comm)) as tickets:
        tickets.begin([range(1)] * comm.size)
        if comm.rank == 0:
            until = time.monotonic() + SLEEP_SECONDS
            while comm.size > 1 and not drawn[0] and time.monotonic() < until:
                time.sleep(1e-3)
            free = comm.size == 1 or bool(drawn[0])
        elif comm.rank == 1:
            tickets.steal()
            drawn[0] = 1
        comm.Barrier()
    flag.Free()
    return bool(comm.bcast(free, root=0))

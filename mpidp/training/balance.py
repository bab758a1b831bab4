"""Distributes the lanes of a step (fixed sequences of micro-batches) among the ranks: evenly, by measured speed, or by work
stealing. Pure.

Ranks are ordered node by node, and neighbouring ranks have neighbouring ranges of lanes. The sum of the gradients does not
depend on which rank computes a lane. Therefore the distribution may change at any step. All ranks must compute the
distribution from the same numbers."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Protocol

from mpidp.data.lanes import even_ranges

if TYPE_CHECKING:
    from mpidp.comm.work_stealing import Tickets

FIRST_STEPS, EVERY_STEPS = 5, 10  # number of measured steps before the first change, and between changes
MEMORY_STEPS = 20  # number of steps over which the median of a rank's speed is taken
WORTH = 0.95  # change only if the predicted time of the slowest rank falls below this fraction of its present time
SHORTEST_SECONDS = 1e-9  # least time of a lane in computations, because a clock may measure 0


def by_speed(num_lanes: int, seconds_per_lane: Sequence[float], max_lanes: int | None = None) -> list[range]:
    """Return one contiguous range of 1 to `max_lanes` lanes (sequences of micro-batches) for each rank. The ranges minimize
    the time of the slowest rank. Independent.

    Lanes are assigned one at a time. The rank that would finish the lane first gets it. If several ranks would finish at the same
    time, the lowest rank gets it. This is optimal, because an additional lane never reduces the time of a rank. Raises ValueError
    if there are fewer lanes than ranks, or more than max_lanes per rank."""
    size = len(seconds_per_lane)
    most = num_lanes if max_lanes is None else max_lanes
    if not size <= num_lanes <= size * most:
        raise ValueError(f"{num_lanes} lanes cannot be distributed among {size} ranks with 1 to {most} lanes each")
    counts = [1] * size
    seconds = [max(SHORTEST_SECONDS, one) for one in seconds_per_lane]
    done = [(2 * one, place) for place, one in enumerate(seconds) if most > 1]  # (time with one more lane, place)
    heapq.heapify(done)
    for _ in range(num_lanes - size):
        _, place = heapq.heappop(done)
        counts[place] += 1
        if counts[place] < most:
            heapq.heappush(done, ((counts[place] + 1) * seconds[place], place))
    starts = [sum(counts[:place]) for place in range(size)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


@dataclass(frozen=True)
class Terms:
    """The arguments of the classes that implement Balance. A word in parentheses is the value of train.balance that uses the
    argument."""

    num_lanes: int
    size: int  # ranks that share the lanes
    place: int  # index of this rank among these ranks
    max_lanes: int | None = None  # largest number of lanes per rank, limited by its gradient slots (measured)
    tickets: Tickets | None = None  # shared counters from which the ranks of this node take lanes (steal)
    first_place: int = 0  # index of the first rank of this rank's node (steal)
    may_steal: Callable[[], bool] = lambda: True  # whether a gradient buffer is free for one more lane (steal)
    idle: int = 0  # the last `idle` ranks compute nothing (even)


class Balance(Protocol):
    """Decides which rank computes which lanes (fixed sequences of micro-batches) of a step."""

    ranges: list[range]  # the lanes of each rank, as known before the step
    static: bool  # whether no lane moves during the step

    def lanes(self, batch: int) -> Iterator[int]:
        """Yield the lanes (sequences of micro-batches) of global batch number `batch` that this rank computes. The call does
        not wait for other ranks, but every rank must call lanes() once per step."""

    def observe(self, seconds: Sequence[float], counts: Sequence[int]) -> str | None:
        """Record the last step. `seconds`: the compute seconds of each rank. `counts`: how many lanes (sequences of
        micro-batches) each rank computed. If the ranges change, return a message, which is logged. Otherwise return None. No
        communication, but all ranks must call observe() with the same values."""

    def close(self) -> None:
        """Release shared memory. Collective over the ranks of a node."""


class Even:
    """Implements train.balance=even. A rank computes the same lanes (sequences of micro-batches) in every step."""

    static = True

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.ranges = even_ranges(terms.num_lanes, terms.size - terms.idle)
        self.ranges += terms.idle * [range(terms.num_lanes, terms.num_lanes)]

    def lanes(self, batch: int) -> Iterator[int]:
        """Yield the lanes in this rank's range."""
        return iter(self.ranges[self.terms.place])

    def observe(self, seconds: Sequence[float], counts: Sequence[int]) -> str | None:
        """Return None, because the ranges never change."""
        return None

    def close(self) -> None:
        """Do nothing."""


class Measured(Even):
    """Implements train.balance=measured. A rank with a shorter median time per lane (sequence of micro-batches) gets more
    lanes. Raises ValueError if `max_lanes` is too low."""

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        self._even = self.ranges
        by_speed(terms.num_lanes, [1.0] * terms.size, terms.max_lanes)
        self._measured: list[deque[float]] = [deque(maxlen=MEMORY_STEPS) for _ in range(terms.size)]
        self._wait = FIRST_STEPS

    def observe(self, seconds: Sequence[float], counts: Sequence[int]) -> str | None:
        """Record the last step. Every few steps, change the ranges if this makes the slowest rank faster by more than the noise
        of the measurements."""
        for memory, spent, count in zip(self._measured, seconds, counts, strict=True):
            if count:
                memory.append(spent / count)
        self._wait -= 1
        if self._wait > 0 or min(map(len, self._measured)) < 2:
            return None
        self._wait = EVERY_STEPS
        memories = [list(memory) for memory in self._measured]
        speed = [median(memory) for memory in memories]
        candidates = [self._even, by_speed(self.terms.num_lanes, speed, self.terms.max_lanes)]
        best = min(candidates, key=lambda ranges: slowest(ranges, speed))  # the even ranges if both are equally good
        # The older and the newer half of the measurements must agree, so that noise in one half changes nothing.
        older = [median(memory[: len(memory) // 2]) for memory in memories]
        newer = [median(memory[len(memory) // 2 :]) for memory in memories]
        if any(slowest(best, each) >= WORTH * slowest(self.ranges, each) for each in (speed, older, newer)):
            return None
        old, new = (" ".join(str(len(lanes)) for lanes in ranges) for ranges in (self.ranges, best))
        self.ranges = best
        return (f"lanes (sequences of micro-batches) per rank: {old} -> {new} "
                f"(seconds per lane, by rank: {' '.join(f'{one:.3g}' for one in speed)})")


class Steal:
    """Implements train.balance=steal. A step starts with even ranges of lanes (sequences of micro-batches). A rank that has
    finished its lanes takes lanes from other ranks of its node, as long as it has free gradient buffers."""

    static = False

    def __init__(self, terms: Terms) -> None:
        if terms.tickets is None:
            raise ValueError("train.balance=steal needs Terms.tickets, but it is None")
        self.ranges = even_ranges(terms.num_lanes, terms.size)
        self._tickets, self._may_steal = terms.tickets, terms.may_steal
        self._of_node = self.ranges[terms.first_place : terms.first_place + terms.tickets.size]

    def lanes(self, batch: int) -> Iterator[int]:
        """Yield the lanes (sequences of micro-batches) of this rank that no other rank has taken. Then yield lanes that this
        rank takes from other ranks."""
        self._tickets.begin(self._of_node)  # set before this rank takes its first lane, because other ranks may steal earlier
        return self._take()

    def _take(self) -> Iterator[int]:
        while (lane := self._tickets.next_own()) is not None:
            yield lane
        while self._may_steal() and (lane := self._tickets.steal()) is not None:
            yield lane

    def observe(self, seconds: Sequence[float], counts: Sequence[int]) -> str | None:
        """Return None, because every step starts with even ranges."""
        return None

    def close(self) -> None:
        """Free the shared counters. Collective over the ranks of a node."""
        self._tickets.close()


def slowest(ranges: Sequence[range], seconds_per_lane: Sequence[float]) -> float:
    """Return the seconds that the slowest rank needs for its range of lanes (sequences of micro-batches). Independent."""
    return max(len(lanes) * one for lanes, one in zip(ranges, seconds_per_lane, strict=True))


BALANCES: dict[str, Callable[[Terms], Balance]] = {"even": Even, "measured": Measured, "steal": Steal}

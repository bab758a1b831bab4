"""How the lanes of a step are shared out among the ranks: evenly, by measured speed, or by stealing. Pure.

Ranks are numbered by place (node after node), and the ranges of neighbouring places are neighbours. Who computes a lane never
changes a bit of the sum, so a balance is free to change its mind; all ranks must only make it up from the same numbers.
"""

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

FIRST_STEPS, EVERY_STEPS = 5, 10  # measured before the first change, and between changes
MEMORY_STEPS = 20  # whose median is a rank's speed
WORTH = 0.95  # of the time of the slowest rank: only what is predicted to be below is a reason to change
SHORTEST_SECONDS = 1e-9  # a lane; clocks may say 0


def by_speed(num_lanes: int, seconds_per_lane: Sequence[float], max_lanes: int | None = None) -> list[range]:
    """Contiguous lanes for each place, 1 to max_lanes, such that the slowest is done as soon as can be. Independent.

    Each next lane goes to who would be done with it first, which is the optimum, since the cost of one more lane never falls;
    of equals the lower place takes it. ValueError when there are too few lanes, or more than max_lanes a rank.
    """
    size = len(seconds_per_lane)
    most = num_lanes if max_lanes is None else max_lanes
    if not size <= num_lanes <= size * most:
        raise ValueError(f"{num_lanes} lanes cannot be shared out among {size} ranks, 1 to {most} each")
    counts = [1] * size
    seconds = [max(SHORTEST_SECONDS, one) for one in seconds_per_lane]
    done = [(2 * one, place) for place, one in enumerate(seconds) if most > 1]  # when, with one lane more
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
    """What a balance is made of; it takes what it needs."""

    num_lanes: int
    size: int  # ranks that share the lanes
    place: int  # of this rank
    max_lanes: int | None = None  # that a rank may ever own: there are gradient slots for them (measured)
    tickets: Tickets | None = None  # of this rank's node (steal)
    first_place: int = 0  # of this rank's node (steal)
    may_steal: Callable[[], bool] = lambda: True  # is there room for the gradient of one more lane? (steal)
    idle: int = 0  # of the ranks, the last, which compute nothing (even)


class Balance(Protocol):
    """Who computes which lanes."""

    ranges: list[range]  # of this step, by place: what a rank expects to compute
    static: bool  # are they what it will compute?

    def lanes(self, batch: int) -> Iterator[int]:
        """The lanes that this rank computes of global batch number `batch`, one by one as it comes to them. Every rank calls
        this once a step. Independent."""

    def observe(self, seconds: Sequence[float], counts: Sequence[int]) -> str | None:
        """After a step: the seconds that each place computed, and how many lanes; the same numbers on every rank. Words for
        the log when the ranges change. Independent."""

    def close(self) -> None:
        """The end of the run. Collective over the ranks of a node."""


class Even:
    """The same lanes in every step."""

    static = True

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.ranges = even_ranges(terms.num_lanes, terms.size - terms.idle)
        self.ranges += terms.idle * [range(terms.num_lanes, terms.num_lanes)]

    def lanes(self, batch: int) -> Iterator[int]:
        """The own range."""
        return iter(self.ranges[self.terms.place])

    def observe(self, seconds: Sequence[float], counts: Sequence[int]) -> str | None:
        """Nothing to learn."""
        return None

    def close(self) -> None:
        """Nothing to close."""


class Measured(Even):
    """More lanes for faster ranks, by the median of what a lane took them. ValueError when max_lanes is too low."""

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        by_speed(terms.num_lanes, [1.0] * terms.size, terms.max_lanes)
        self._measured: list[deque[float]] = [deque(maxlen=MEMORY_STEPS) for _ in range(terms.size)]
        self._wait = FIRST_STEPS

    def observe(self, seconds: Sequence[float], counts: Sequence[int]) -> str | None:
        """Every few steps: other ranges, where they make the slowest rank's compute faster by more than noise does."""
        for memory, spent, count in zip(self._measured, seconds, counts, strict=True):
            if count:
                memory.append(spent / count)
        self._wait -= 1
        if self._wait > 0 or min(map(len, self._measured)) < 2:
            return None
        self._wait = EVERY_STEPS
        memories = [list(memory) for memory in self._measured]
        speed = [median(memory) for memory in memories]
        num_lanes = self.terms.num_lanes
        candidates = [even_ranges(num_lanes, self.terms.size), by_speed(num_lanes, speed, self.terms.max_lanes)]
        best = min(candidates, key=lambda ranges: slowest(ranges, speed))  # the even cut, where it is as good
        # The older and the newer half must both agree: a spell of noise in one of them is no reason to change.
        older = [median(memory[: len(memory) // 2]) for memory in memories]
        newer = [median(memory[len(memory) // 2 :]) for memory in memories]
        if any(slowest(best, each) >= WORTH * slowest(self.ranges, each) for each in (speed, older, newer)):
            return None
        old, new = (" ".join(str(len(lanes)) for lanes in ranges) for ranges in (self.ranges, best))
        self.ranges = best
        return f"lanes {old} -> {new} (measured {' '.join(f'{one:.3g}' for one in speed)} s a lane)"


class Steal:
    """An even start; who is done takes lanes of others on its node, while there is room for their gradients."""

    static = False

    def __init__(self, terms: Terms) -> None:
        if terms.tickets is None:
            raise ValueError("stealing needs the tickets of the node")
        self.ranges = even_ranges(terms.num_lanes, terms.size)
        self._tickets, self._may_steal = terms.tickets, terms.may_steal
        self._of_node = self.ranges[terms.first_place : terms.first_place + terms.tickets.size]

    def lanes(self, batch: int) -> Iterator[int]:
        """The own lanes that no other has taken, then others'."""
        self._tickets.begin(self._of_node)  # now, not with the first lane: others may steal before that
        return self._take()

    def _take(self) -> Iterator[int]:
        while (lane := self._tickets.next_own()) is not None:
            yield lane
        while self._may_steal() and (lane := self._tickets.steal()) is not None:
            yield lane

    def observe(self, seconds: Sequence[float], counts: Sequence[int]) -> str | None:
        """Nothing to learn: every step begins evenly."""
        return None

    def close(self) -> None:
        """Give up the tickets. Collective over the node."""
        self._tickets.close()


def slowest(ranges: Sequence[range], seconds_per_lane: Sequence[float]) -> float:
    """Seconds of the rank that is done last. Independent."""
    return max(len(lanes) * one for lanes, one in zip(ranges, seconds_per_lane, strict=True))


BALANCES: dict[str, Callable[[Terms], Balance]] = {"even": Even, "measured": Measured, "steal": Steal}

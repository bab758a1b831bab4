"""Laws of balance: every lane once, an optimal distribution that is the same on every rank, stable under noise, and able to
return to even."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpidp.data.lanes import Lanes, even_ranges
from mpidp.training.balance import (
    BALANCES,
    EVERY_STEPS,
    FIRST_STEPS,
    MEMORY_STEPS,
    Measured,
    Steal,
    Terms,
    by_speed,
    slowest,
)


def counts(ranges: Sequence[range]) -> list[int]:
    return [len(lanes) for lanes in ranges]


def covers(ranges: Sequence[range], num_lanes: int) -> bool:
    return [lane for lanes in ranges for lane in lanes] == list(range(num_lanes))


@given(st.integers(1, 40), st.integers(1, 12))
def test_even_is_the_cut_of_lanes(num_lanes: int, size: int) -> None:
    lanes = Lanes(num_lanes, 1, num_lanes)
    assert even_ranges(num_lanes, size) == [lanes.of_rank(place, size) for place in range(size)]
    assert covers(even_ranges(num_lanes, size), num_lanes)


@st.composite
def shared_out(draw: st.DrawFn) -> tuple[int, list[float], int | None]:
    """Draw (lanes, seconds per lane, largest number of lanes of a rank) with a solution, small enough to try all."""
    size = draw(st.integers(1, 4))
    num_lanes = draw(st.integers(size, 10))
    seconds = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.1, 2.0, 3.7]) | st.floats(0.01, 10), min_size=size, max_size=size))
    return num_lanes, seconds, draw(st.none() | st.integers(-(-num_lanes // size), num_lanes))


@given(shared_out())
def test_no_cut_is_done_sooner(given_: tuple[int, list[float], int | None]) -> None:
    num_lanes, seconds, most = given_
    found = by_speed(num_lanes, seconds, most)
    assert covers(found, num_lanes) and all(1 <= n <= (most or num_lanes) for n in counts(found))
    others = [
        cut for cut in itertools.product(range(1, (most or num_lanes) + 1), repeat=len(seconds)) if sum(cut) == num_lanes
    ]
    best = min(max(n * one for n, one in zip(cut, seconds, strict=True)) for cut in others)
    assert slowest(found, seconds) == pytest.approx(best, rel=1e-12, abs=1e-6)


def test_half_the_speed_is_half_the_lanes() -> None:
    assert counts(by_speed(12, [1.0, 2.0])) == [8, 4]
    assert counts(by_speed(12, [1.0, 2.0], max_lanes=7)) == [7, 5]
    assert counts(by_speed(12, [1e-3, 1.0, 1.0])) == [10, 1, 1]
    assert counts(by_speed(10, [1.0] * 4)) == [3, 3, 2, 2]  # of equal ranks the lower ones get more


@pytest.mark.parametrize(("num_lanes", "size", "most"), [(3, 4, None), (12, 2, 5)])
def test_what_cannot_be_shared_out_is_refused(num_lanes: int, size: int, most: int | None) -> None:
    with pytest.raises(ValueError, match=f"{num_lanes} lanes cannot be distributed among {size} ranks"):
        by_speed(num_lanes, [1.0] * size, most)
    with pytest.raises(ValueError, match="cannot be distributed among"):
        Measured(Terms(num_lanes, size, 0, most))


def steps(balances: Sequence[Measured], speeds: Callable[[int], Sequence[float]], number: int, noise: float = 0.0) -> list[str]:
    """Return the distributions of several balances over so many steps; all of them get the same times."""
    chance, said = random.Random(1), []
    for step in range(number):
        lanes = counts(balances[0].ranges)
        seconds = [n * one * chance.gauss(1, noise) for n, one in zip(lanes, speeds(step), strict=True)]
        words = {balance.observe(seconds, lanes) for balance in balances}
        assert len(words) == 1 and all(balance.ranges == balances[0].ranges for balance in balances)
        said += [f"{step + 1}: {word}" for word in words if word is not None]
    return said


def test_measured_gives_a_slow_rank_less_and_all_ranks_agree() -> None:
    balances = [Measured(Terms(12, 2, place)) for place in range(2)]
    said = steps(balances, lambda step: [0.021, 0.043], 60)
    change = "lanes (sequences of micro-batches) per rank: 6 6 -> 8 4 (seconds per lane, by rank: 0.021 0.043)"
    assert said == [f"{FIRST_STEPS}: {change}"]
    assert [list(b.lanes(7)) for b in balances] == [list(range(8)), list(range(8, 12))]


def test_measured_keeps_to_the_most_lanes_of_a_rank() -> None:
    balance = Measured(Terms(12, 2, 0, max_lanes=7))
    steps([balance], lambda step: [1.0, 5.0], 60)
    assert counts(balance.ranges) == [7, 5]


@pytest.mark.parametrize(("num_lanes", "size"), [(12, 2), (64, 4), (64, 8)])
def test_noise_changes_nothing(num_lanes: int, size: int) -> None:
    balance = Measured(Terms(num_lanes, size, 0))
    assert steps([balance], lambda step: [1.0] * size, 300, noise=0.1) == []


def test_a_slow_rank_among_noise_is_seen_once() -> None:
    assert len(steps([Measured(Terms(12, 2, 0))], lambda step: [1.0, 2.0], 300, noise=0.1)) == 1


def test_one_slow_step_changes_nothing() -> None:
    assert steps([Measured(Terms(12, 2, 0))], lambda step: [1.0, 50.0 if step % 9 == 3 else 1.0], 100) == []


def test_measured_goes_back_to_even() -> None:
    balance = Measured(Terms(12, 2, 0))
    said = steps([balance], lambda step: [1.0, 2.0] if step < 40 else [1.0, 1.0], 40 + MEMORY_STEPS + EVERY_STEPS, noise=0.1)
    assert len(said) == 2 and balance.ranges == even_ranges(12, 2)


def test_changes_are_rare() -> None:
    """Even if speeds change all the time."""
    said = steps([Measured(Terms(24, 2, 0))], lambda step: [1.0, [1.0, 4.0][step // 25 % 2]], 200)
    at = [int(words.split(":")[0]) for words in said]
    assert len(at) > 2 and all(after - before >= EVERY_STEPS for before, after in itertools.pairwise(at))


def test_a_gain_that_is_too_small_changes_nothing() -> None:
    assert steps([Measured(Terms(64, 2, 0))], lambda step: [1.0, 1.08], 60) == []  # 33 and 31 lanes would gain 3%
    assert len(steps([Measured(Terms(64, 2, 0))], lambda step: [1.0, 1.2], 60)) == 1


class FakeTickets:
    """The tickets of one rank on a node with `size` ranks, without MPI."""

    def __init__(self, size: int, own: list[int], others: list[int]) -> None:
        self.size, self.began, self.closed = size, [], False
        self._own, self._others = own, others

    def begin(self, ranges: Sequence[range]) -> None:
        self.began.append(list(ranges))

    def next_own(self) -> int | None:
        return self._own.pop(0) if self._own else None

    def steal(self) -> int | None:
        return self._others.pop() if self._others else None

    def close(self) -> None:
        self.closed = True


def stealing(room: Iterator[bool]) -> tuple[Steal, FakeTickets]:
    """Rank 3 of 4, the second rank of the second node."""
    tickets = FakeTickets(2, own=[9, 10], others=[6, 7, 8])
    return Steal(Terms(12, 4, 3, tickets=tickets, first_place=2, may_steal=lambda: next(room))), tickets  # type: ignore[arg-type]


def test_stealing_is_within_the_node_and_after_the_own_lanes() -> None:
    balance, tickets = stealing(itertools.repeat(True))
    lanes = balance.lanes(0)
    assert tickets.began == [[range(6, 9), range(9, 12)]], "before the first lane is asked for"
    assert list(lanes) == [9, 10, 8, 7, 6]
    assert balance.observe([1.0] * 4, [3] * 4) is None and covers(balance.ranges, 12)
    balance.close()
    assert tickets.closed


def test_nothing_is_stolen_without_room() -> None:
    balance, _ = stealing(iter([True, False]))
    assert list(balance.lanes(0)) == [9, 10, 8]
    with pytest.raises(ValueError, match="tickets"):
        Steal(Terms(12, 4, 3))


def test_balances_by_name() -> None:
    terms = Terms(7, 3, 1, tickets=FakeTickets(3, [], []))  # type: ignore[arg-type]
    made = {name: make(terms) for name, make in BALANCES.items()}
    assert {name: balance.static for name, balance in made.items()} == {"even": True, "measured": True, "steal": False}
    assert all(balance.ranges == even_ranges(7, 3) for balance in made.values())
    assert list(made["even"].lanes(0)) == [2, 3] and made["even"].observe([1.0] * 3, [1] * 3) is None
    made["even"].close()

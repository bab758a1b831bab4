"""Replicas of the living ranks after ranks of a mesh have failed or joined."""

from __future__ import annotations

import random

import pytest

from mpidp.parallel.replicas import Replicas, Seat, form_replicas
from mpidp.runtime.topology import _in_runs


def living(replicas: int, parts: int, failed: set[int]) -> tuple[list[Seat | None], list[int]]:
    """Return (seats, numbers) of the ranks of a mesh that have not failed."""
    numbers = [rank for rank in range(replicas * parts) if rank not in failed]
    return [divmod(rank, parts) for rank in numbers], numbers


def of_numbers(found: Replicas) -> list[int]:
    return [found.numbers[rank] for rank in found.order]


@pytest.mark.parametrize(("failed", "trains", "as_before"), [
    (set(), [0, 1, 2, 3, 4, 5], True),
    ({1}, [2, 3, 4, 5], True),  # rank 0 waits
    ({0, 3}, [4, 5, 2, 1], False),  # ranks of two replicas form one
    ({1, 3}, [4, 5, 0, 2], False),  # rank 2 becomes the other part
    ({0, 1, 2, 3}, [4, 5], True),
    ({0, 2, 5}, [4, 1], False),  # one part 0 and two parts 1 are left
])
def test_three_replicas_of_two(failed: set[int], trains: list[int], as_before: bool) -> None:
    found = form_replicas(*living(3, 2, failed), 2)
    assert (of_numbers(found), found.as_before, found.lost) == (trains, as_before, False)


def test_a_part_without_a_holder() -> None:
    found = form_replicas(*living(2, 2, {1, 3}), 2)
    assert (of_numbers(found), found.lost) == ([0, 2], True)


def test_too_few_ranks() -> None:
    assert form_replicas(*living(2, 3, {0, 1, 2, 3}), 3).order == []


def test_new_ranks_fill_gaps_before_spare_ranks_do() -> None:
    found = form_replicas([None, (1, 0), (1, 1), None], [0, 2, 3, 4], 2)
    assert of_numbers(found) == [2, 3, 0, 4] and found.spares() == []


@pytest.mark.parametrize("seed", range(200))
def test_the_first_replica_holds_every_part(seed: int) -> None:
    draw = random.Random(seed)
    replicas, parts = draw.randint(1, 5), draw.randint(2, 4)
    seats, numbers = living(replicas, parts, set(draw.sample(range(replicas * parts), draw.randint(0, replicas * parts - 1))))
    seats += [None] * draw.randint(0, 3)
    numbers += range(100, 100 + len(seats) - len(numbers))
    order = draw.sample(range(len(seats)), len(seats))
    seats, numbers = [seats[i] for i in order], [numbers[i] for i in order]
    found = form_replicas(seats, numbers, parts)
    assert len(found.order) == len(seats) // parts * parts and len(set(found.order)) == len(found.order)
    assert sorted(found.spares()) == sorted(set(numbers) - set(of_numbers(found)))
    held = [seats[rank] for rank in found.order]
    assert found.lost == (len({seat[1] for seat in seats if seat}) < parts and any(seats))
    if found.order and not found.lost and any(seats):
        assert [seat and seat[1] for seat in held[:parts]] == list(range(parts))
    if found.as_before and not found.lost:
        assert held == sorted(seat for seat in held if seat)
        assert all(len({seat[0] for seat in held[i : i + parts] if seat}) == 1 for i in range(0, len(held), parts))


def test_a_node_that_occurs_again_is_another_node() -> None:
    assert _in_runs(["a", "a", "b", "a", "b", "b", "a"]) == ["a", "a", "b", "a#", "b#", "b#", "a##"]

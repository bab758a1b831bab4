"""Laws of work stealing. Every lane is computed once, even if ranks sleep. Other ranks take lanes of sleeping ranks. No rank
waits for another rank."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mpidp.comm import work_stealing
from mpidp.comm.work_stealing import Tickets, steals_freely
from tests.tiny import WORLD, everywhere

pytestmark = pytest.mark.mpi
STEPS = 200
PATIENCE_SECONDS = 30.0  # a sleeping rank wakes after this time, so that a broken law fails instead of hanging


def cuts(step: int) -> list[range]:
    """Draw consecutive ranges of any length, which may be empty. They differ between steps, and are the same on every rank."""
    lengths = [random.Random(f"{step}/{place}").choice([0, 1, 2, 3, 7]) for place in range(WORLD.size)]
    starts = [sum(lengths[:place]) for place in range(WORLD.size)]
    return [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]


def taken(tickets: Tickets, pause: Callable[[], None]) -> Iterator[int]:
    """Take and return all lanes of this rank in a step."""
    for take in (tickets.next_own, tickets.steal):
        while (lane := take()) is not None:
            yield lane
            pause()


def nap(chance: random.Random, step: int) -> float:
    """Return the seconds between two lanes. In turn, steps have no pauses, uneven pauses, or rare and long pauses."""
    return [0.0, chance.choice([0.0, 0.0, 1e-5, 3e-4]), 0.01 * (chance.random() < 0.02)][step % 3]


def check_many_steps() -> None:
    """Take the lanes of many steps, then check that each was taken once. Collective over WORLD."""
    chance, tickets, mine = random.Random(WORLD.rank), Tickets(WORLD), []
    for step in range(STEPS):
        tickets.begin(cuts(step))
        mine.append(list(taken(tickets, lambda step=step: time.sleep(nap(chance, step)))))  # type: ignore[misc]
        WORLD.Barrier()
    tickets.close()
    found = WORLD.allgather(mine)
    for step in range(STEPS):
        lanes = sorted(lane for of_rank in found for lane in of_rank[step])
        assert lanes == list(range(cuts(step)[-1].stop)), f"step {step}"


def test_every_lane_is_taken_once() -> None:
    check_many_steps()


def test_every_lane_is_taken_once_when_calls_are_torn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank may be delayed between any two operations, for example between its permission and its lane."""
    draw, chance = Tickets._draw, random.Random(WORLD.rank)

    def slow(self: Tickets, *about: Any) -> int:
        time.sleep(chance.choice([0.0, 0.0, 0.0, 2e-4]))
        return draw(self, *about)

    monkeypatch.setattr(Tickets, "_draw", slow)
    check_many_steps()


def test_who_sleeps_loses_lanes_to_the_others(shared_tmp: Path) -> None:
    """The sleeping rank makes no MPI call until the other ranks are done. If they needed the sleeping rank, they could not
    continue."""
    if not steals_freely(WORLD):
        pytest.skip("with this MPI, drawing from a counter waits for the rank that owns it (MPICH 4): training does not steal")
    size = WORLD.size
    ranges = [range(6 * place, 6 * place + 6) for place in range(size)]
    for sleeper in {0, size - 1}:
        tickets, mine = Tickets(WORLD), []
        tickets.begin(ranges)
        if WORLD.rank == sleeper:
            mine.append(tickets.next_own())
        WORLD.Barrier()
        if WORLD.rank == sleeper:
            until = time.monotonic() + PATIENCE_SECONDS
            while len(list(shared_tmp.glob(f"{sleeper}_*"))) < size - 1 and time.monotonic() < until:
                time.sleep(0.01)
        mine += list(taken(tickets, lambda: None))
        (shared_tmp / f"{sleeper}_{WORLD.rank}").touch()
        found = WORLD.allgather(mine)
        tickets.close()
        everywhere(sorted(lane for lanes in found for lane in lanes) == list(range(6 * size)), "every lane once")
        everywhere(found[sleeper] == (list(range(6)) if size == 1 else [ranges[sleeper][0]]), "the sleeper has one lane")


def test_an_mpi_that_waits_for_the_owner_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rank 1's draw takes longer than rank 0 stays away from MPI, it may have waited for rank 0."""
    monkeypatch.setattr(work_stealing, "SLEEP_SECONDS", 0.05)
    draw = Tickets._draw

    def waits(self: Tickets, *about: Any) -> int:
        time.sleep(0.1)
        return draw(self, *about)

    monkeypatch.setattr(Tickets, "_draw", waits)
    everywhere(steals_freely(WORLD) == (WORLD.size == 1), "not usable")


def test_thieves_take_from_the_right_of_who_has_most() -> None:
    ranges = [range(10 * place, 10 * place + place + 2) for place in range(WORLD.size)]
    tickets = Tickets(WORLD)
    tickets.begin(ranges)
    stolen = tickets.steal() if WORLD.rank == 0 else None
    WORLD.Barrier()
    everywhere(WORLD.bcast(stolen) == ranges[-1][-1], "the rightmost lane of the longest range")
    everywhere(tickets.next_own() == ranges[WORLD.rank][0], "owners begin on the left")
    WORLD.Barrier()
    tickets.close()


def test_a_step_knows_nothing_of_the_one_before() -> None:
    """Lanes that were not taken in a step are discarded in the next step, in both sets of counters."""
    tickets = Tickets(WORLD)
    for step in range(6):
        tickets.begin([range(place, place + 1) for place in range(WORLD.size)])
        if step % 3:
            everywhere(tickets.next_own() == WORLD.rank, f"step {step}: the own lane")
            everywhere(tickets.steal() is None, f"step {step}: and no other")
        WORLD.Barrier()
    tickets.close()


def test_a_range_a_rank_is_asked_for() -> None:
    tickets = Tickets(WORLD)
    with pytest.raises(ValueError, match=f"{WORLD.size} ranks, but .* {WORLD.size + 1} ranges of lanes"):
        tickets.begin([range(2)] * (WORLD.size + 1))
    tickets.close()

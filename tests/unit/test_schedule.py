"""Laws of schedules: no deadlock, a fixed order of sums, and a bubble as short as documented."""

from __future__ import annotations

from fractions import Fraction

import pytest

from mpidp.parallel.schedule import Backward, Forward, Instruction, interleaved, one_f_one_b


def schedules(stages: int, chunks: int, count: int) -> list[list[Instruction]]:
    vs = list(range(5, 5 + count))
    if chunks == 1:
        return [list(one_f_one_b(vs, stage, stages)) for stage in range(stages)]
    return [list(interleaved(vs, stage, stages, chunks)) for stage in range(stages)]


def seconds(orders: list[list[Instruction]], stages: int, chunks: int) -> Fraction:
    """Return the time of a step in which a micro-batch takes 1 for a stage's forward, 2 for its backward, and messages take 0.
    AssertionError on a deadlock."""
    done: dict[tuple[bool, int, int], Fraction] = {}
    clock, at, moved = [Fraction(0)] * stages, [0] * stages, True
    while moved:
        moved = False
        for s, order in enumerate(orders):
            while at[s] < len(order):
                one = order[at[s]]
                forward, place = isinstance(one, Forward), one.chunk * stages + s
                ready = Fraction(0)
                needs = [(forward, one.v, place - 1 if forward else place + 1)]
                needs = [key for key in needs if 0 <= key[2] < stages * chunks]
                needs += [] if forward else [(True, one.v, place)]
                if any(key not in done for key in needs):
                    break
                ready = max([done[key] for key in needs], default=ready)
                clock[s] = max(clock[s], ready) + Fraction(1 if forward else 2, chunks)
                done[forward, one.v, place] = clock[s]
                at[s], moved = at[s] + 1, True
    assert at == [len(order) for order in orders], "all wait for each other"
    return max(clock)


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_every_stage_gets_through(stages: int, chunks: int) -> None:
    """For any number of micro-batches: each passes once through each chunk, in order, and the last one is marked."""
    for count in (*range(1, 18), 24, 31, 32):
        orders = schedules(stages, chunks, count)
        took = seconds(orders, stages, chunks)
        for order in orders:
            for kind in (Forward, Backward):
                for chunk in range(chunks):
                    mine = [one.v for one in order if isinstance(one, kind) and one.chunk == chunk]
                    assert mine == list(range(5, 5 + count))
            assert [one.last for one in order if isinstance(one, Backward)] == [False] * (count * chunks - 1) + [True]
        if count % stages == 0:  # Narayanan 2021, section 2.2.2
            assert took / (3 * count) - 1 == Fraction(stages - 1, count * chunks), (count, took)
        elif chunks > 1 and count > stages:
            assert took <= seconds(schedules(stages, 1, count), stages, 1), count


@pytest.mark.parametrize("chunks", [2, 4])
def test_few_micro_batches_are_in_flight(chunks: int) -> None:
    """The first stage keeps (1 + (S - 1) / (K S)) times as much as with 1F1B (Korthikanti 2022, section 4.2.3), also with many
    micro-batches."""
    stages = 4
    for count in (8, 64):
        open_, most = 0, 0
        for one in interleaved(range(count), 0, stages, chunks):
            open_ += 1 if isinstance(one, Forward) else -1
            most = max(most, open_)
        assert Fraction(most, chunks) == stages * (1 + Fraction(stages - 1, chunks * stages))

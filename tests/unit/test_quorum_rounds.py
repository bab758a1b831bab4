"""Laws of the members of a quorum's rounds, in any order of arrival: each contribution joins one round within the bound; no round
waits forever; and the log can be replayed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpidp.errors import MpidpError, UsageError
from mpidp.strategies.arrivals import read_arrivals
from mpidp.strategies.quorum_rounds import RoundTracker


def run(tracker: RoundTracker, chance: st.DataObject, rounds: int) -> list[list[int]]:
    """Simulate ranks that contribute a batch at random times, after the round of the previous batch is closed; the last round is
    a meeting. Return the members of each round. AssertionError if no rank can continue."""
    ranks, found = len(tracker.lanes), list[list[int]]()
    while len(found) < rounds:
        able = [rank for rank in range(ranks) if tracker.given[rank] <= len(found)]
        while (closed := tracker.close_round()) is None:
            assert able, "all have given what they can, and the round does not close"
            rank = able.pop(chance.draw(st.integers(0, len(able) - 1)))
            tracker.add(rank, 10.0**rank, tracker.given[rank] + 1 == rounds)
            if tracker.given[rank] <= len(found):
                able.append(rank)
        joined, tokens, is_last = closed
        assert tokens == sum(count * 10.0**rank for rank, count in enumerate(joined)) and is_last == (len(found) + 1 == rounds)
        found.append(joined)
    return found


@given(st.data(), st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(0, 3), st.integers(1, 7))
def test_each_joins_once_and_in_time(data: st.DataObject, lanes: list[int], staleness: int, rounds: int) -> None:
    needed = data.draw(st.integers(1, sum(lanes)))
    found = run(RoundTracker(lanes, needed, staleness), data, rounds)
    had = [0] * len(lanes)
    for i, joined in enumerate(found, 1):
        had = [one + count for one, count in zip(had, joined, strict=True)]
        assert i - staleness <= min(had) and max(had) == i
        assert sum(lane for lane, count in zip(lanes, had, strict=True) if count == i) >= needed
    assert had == [rounds] * len(lanes)


@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
def test_another_order_of_coming_repeats_the_rounds(data: st.DataObject, ranks: int, staleness: int, rounds: int) -> None:
    found = run(RoundTracker([1] * ranks, 1, staleness), data, rounds)
    order = [[rank for rank, count in enumerate(joined) for _ in range(count)] for joined in found]
    assert run(RoundTracker([1] * ranks, 1, staleness, order), data, rounds) == found


def test_a_round_without_a_target_waits_for_all() -> None:
    tracker = RoundTracker([1, 1], 1, 1)
    tracker.add(0, 0.0, False)
    assert tracker.close_round() is None
    tracker.add(1, 0.0, False)
    assert tracker.close_round() == ([1, 1], 0.0, False)


@pytest.mark.parametrize("order", [[[0, 1]], [[0], [0, 1]]])
def test_meetings_elsewhere_than_in_the_run_that_is_repeated(order: list[list[int]]) -> None:
    tracker = RoundTracker([1, 1], 1, 1, order)
    for rank in range(2):
        tracker.add(rank, 1.0, len(order) > 1)
    with pytest.raises(MpidpError, match="strategy.replay"):
        list(iter(tracker.close_round, None))


LINES = [{"step": 1}, {"step": 2, "arrivals": [[0], [0, 1, 1]]}, {"step": 4, "arrivals": [[0, 1], [1], [0, 0, 1]]}]


def read(folder: Path, *lines: object, ranks: int = 2, staleness: int = 1) -> object:
    (folder / "log").write_text("\n".join(map(json.dumps, lines)))
    return read_arrivals(str(folder / "log"), ranks, 0, staleness)


def test_the_log_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, *LINES) == {2: LINES[1]["arrivals"], 4: LINES[2]["arrivals"]}
    assert read_arrivals("", 2, 0, 1) == {}


@pytest.mark.parametrize(("rounds", "said"), [
    ([[0, 1], [0, 2]], r"more ranks than this run \(2\)"), ([[0], [0, 1]], "some of the 2 ranks are missing"),
    ([[0], [0], [0, 1, 1, 1]], "not possible with 2 ranks and strategy.staleness=1"),
    ([[0, 0, 1], [1]], "not possible with 2 ranks"), ([[], [0, 0, 1, 1]], "not possible with 2 ranks"),
])  # fmt: skip
def test_what_could_not_have_been_is_refused(tmp_path: Path, rounds: list[list[int]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(tmp_path, {"step": 9, "arrivals": rounds})


def test_a_log_without_arrivals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="had no quorum"):
        read(tmp_path, LINES[0])


def pushes(folder: Path, *lines: str) -> object:
    (folder / "log").write_text("\n".join(lines))
    return read_arrivals(str(folder / "log"), 2, 2, 1)


def test_the_order_of_pushes_must_be_complete(tmp_path: Path) -> None:
    whole = '{"step": 2, "arrivals": [[0, 1, 1, 0], [1, 0, 1, 0]]}'
    assert pushes(tmp_path, whole, '{"step": 4, "tra') == {2: [[0, 1, 1, 0], [1, 0, 1, 0]]}
    for order in ([[0, 1, 1], [1, 0, 1]], [[0, 1], [0, 1, 0, 1]], [[0, 1, -1], [0, 1, -1]]):
        with pytest.raises(UsageError, match="step 2: the recorded order of arrivals is damaged. .*each of the 2 workers sends"):
            pushes(tmp_path, json.dumps({"step": 2, "arrivals": order}))
    for damaged in ('{"step": 4, "arrivals": 7}', '{"step": 4, "arrivals": [["0"], ["0"]]}', "{"):
        with pytest.raises(UsageError, match="1 lines are damaged"):
            pushes(tmp_path, whole, damaged, whole)

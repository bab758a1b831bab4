"""Laws of lanes: every micro-batch is in one lane, lanes have even sizes, and they do not depend on ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpidp.data.lanes import MAX_DEFAULT_LANES, Lanes
from mpidp.parallel.schedule import Backward, Forward, one_f_one_b


@st.composite
def many_lanes(draw: st.DrawFn) -> Lanes:
    global_batch = draw(st.integers(1, 300))
    micro_batch = draw(st.integers(1, global_batch))
    return Lanes(global_batch, micro_batch, draw(st.integers(0, -(-global_batch // micro_batch))))


@given(many_lanes())
def test_every_sequence_is_in_one_micro_batch_of_one_lane(lanes: Lanes) -> None:
    per_lane = [lanes.micro_batches(lane) for lane in range(lanes.num_lanes)]
    assert [v for run in per_lane for v in run] == list(range(lanes.num_micro_batches))
    assert max(map(len, per_lane)) - min(map(len, per_lane)) <= 1 and min(map(len, per_lane)) >= 1
    sequences = [lanes.sequences(v) for v in range(lanes.num_micro_batches)]
    assert [s for run in sequences for s in run] == list(range(lanes.global_batch))
    assert all(len(run) == lanes.micro_batch for run in sequences[:-1]) and 1 <= len(sequences[-1]) <= lanes.micro_batch


@given(many_lanes(), st.data())
def test_every_lane_has_one_rank(lanes: Lanes, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, lanes.num_lanes))
    shares = [lanes.of_rank(rank, world_size) for rank in range(world_size)]
    assert [lane for share in shares for lane in share] == list(range(lanes.num_lanes))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1 and min(map(len, shares)) >= 1


@pytest.mark.parametrize(("batch", "micro", "wanted", "found"), [(32, 4, 0, 8), (300, 1, 0, MAX_DEFAULT_LANES), (13, 2, 0, 7),
                                                                 (24, 1, 8, 8), (1, 1, 0, 1)])
def test_default_lanes_are_one_a_micro_batch_up_to_a_bound(batch: int, micro: int, wanted: int, found: int) -> None:
    assert Lanes(batch, micro, wanted).num_lanes == found


@pytest.mark.parametrize("wrong", [(4, 5, 0), (4, 0, 0), (8, 2, 5), (8, 2, -1)])
def test_cuts_that_cannot_be_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, and at most"):
        Lanes(*wrong)


def test_accumulation_marks_the_last_backward() -> None:
    assert list(one_f_one_b([4, 5])) == [Forward(4), Backward(4, False), Forward(5), Backward(5, True)]
    assert list(one_f_one_b([])) == []

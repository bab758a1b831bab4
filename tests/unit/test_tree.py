"""Laws of the tree over lanes: one sum, bit for bit, whichever rank computes which lanes in which order; few buffers; few
roundings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidp.data.lanes import Lanes
from mpidp.reducers.tree import slots_needed
from mpidp.reducers.tree_order import Node, TreeSum, fold, fold_all, held_after

Groups = list[list[list[int]]]  # the lanes of each rank of each group, in the order in which it computes them
Place = tuple[int, int, int]  # (group, rank in it, slot)


@st.composite
def shared_out(draw: st.DrawFn) -> tuple[int, Groups]:
    """Draw any number of lanes; groups hold consecutive ranges of them (some empty), their ranks any of those, in any order."""
    num_lanes = draw(st.integers(1, 100))
    inner = sorted(draw(st.lists(st.integers(0, num_lanes), max_size=6)))
    groups: Groups = []
    for start, stop in pairwise([0, *inner, num_lanes]):
        ranks: list[list[int]] = [[] for _ in range(draw(st.integers(1, 4)))]
        for lane in draw(st.permutations(range(start, stop))):
            ranks[draw(st.integers(0, len(ranks) - 1))].append(lane)
        groups.append(ranks)
    return num_lanes, groups


def gradients(num_lanes: int, seed: int) -> np.ndarray:
    """Return (num_lanes, 5) float32 of very different magnitudes and signs: another order of addition gives other bits."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((num_lanes, 5)) * 10.0 ** rng.integers(-4, 5, (num_lanes, 5))).astype(np.float32)


def reference(values: np.ndarray, level: int | None = None, index: int = 0) -> np.ndarray:
    """The definition: node (k, i) is (k-1, 2i) + (k-1, 2i+1), or its left child if the right one has no lane."""
    level = (len(values) - 1).bit_length() if level is None else level
    if level == 0:
        return values[index]
    left = reference(values, level - 1, 2 * index)
    if (2 * index + 1) << (level - 1) >= len(values):
        return left
    return left + reference(values, level - 1, 2 * index + 1)


def lanes_of(node: Node, num_lanes: int) -> set[int]:
    level, index = node
    return set(range(index << level, min((index + 1) << level, num_lanes)))


class Rank:
    """A rank that follows its TreeSum. It asserts that no used slot is overwritten and no empty one is read."""

    def __init__(self, lanes: Iterable[int], values: np.ndarray, siblings_share: bool) -> None:
        tree_sum = TreeSum(len(values), siblings_share)
        self.slots: dict[int, np.ndarray] = {}
        self.holds: dict[int, set[int]] = {}
        for lane in lanes:
            slot, fresh = tree_sum.open(lane)
            assert fresh == (slot not in self.holds), "a slot that holds a sum is not zeroed, any other is"
            self.slots[slot] = values[lane].copy() if fresh else self.slots[slot] + values[lane]
            self.holds[slot] = {lane} if fresh else self.holds[slot] | {lane}
            for into, source in tree_sum.close(lane):
                self.slots[into] = self.slots[into] + self.slots[source]
                self.holds[into] |= self.holds.pop(source)
        self.nodes, self.num_slots = tree_sum.nodes, tree_sum.num_slots
        assert self.holds == {slot: lanes_of(node, len(values)) for node, slot in self.nodes.items()}
        assert set(self.slots) == set(range(self.num_slots))


def add(places: dict[Place, np.ndarray], additions: Sequence[tuple[Place, Place]]) -> None:
    """Add in place. A slot that was added to another is not read again."""
    gone: set[Place] = set()
    for into, source in additions:
        assert into != source and not gone & {into, source}
        places[into] = places[into] + places[source]
        gone.add(source)


@settings(max_examples=300, deadline=None)
@given(shared_out(), st.booleans(), st.integers(0, 2**32))
def test_whoever_computes_which_lanes_the_bits_are_the_references(
    cut: tuple[int, Groups], siblings_share: bool, seed: int
) -> None:
    num_lanes, groups = cut
    values = gradients(num_lanes, seed)
    places: dict[Place, np.ndarray] = {}
    everywhere: list[tuple[Node, Place]] = []
    for g, group in enumerate(groups):
        held: list[tuple[Node, Place]] = []
        for r, lanes in enumerate(group):
            rank = Rank(lanes, values, siblings_share)
            assert (rank.nodes, rank.num_slots) == held_after(lanes, num_lanes, siblings_share)
            places |= {(g, r, slot): value for slot, value in rank.slots.items()}
            held += [(node, (g, r, slot)) for node, slot in rank.nodes.items()]
        additions, left_over = fold(held, num_lanes)
        add(places, additions)
        # The remaining nodes of a group depend only on its range of lanes, not on which rank computed which.
        run = sorted(lane for lanes in group for lane in lanes)
        assert [node for node, _ in left_over] == [node for node, _ in fold([((0, lane), lane) for lane in run], num_lanes)[1]]
        assert set().union(*(lanes_of(node, num_lanes) for node, _ in left_over)) == set(run)
        everywhere += left_over
    additions, at = fold_all(everywhere, num_lanes)
    assert not additions or additions[-1][0] == at  # the last addition writes the sum
    add(places, additions)
    np.testing.assert_array_equal(places[at].view(np.int32), reference(values).view(np.int32))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.booleans())
def test_few_buffers(num_lanes: int, ranks: int, siblings_share: bool) -> None:
    for rank in range(ranks):
        lanes = Lanes(num_lanes, 1, num_lanes).of_rank(rank, ranks)
        if not lanes:
            continue
        nodes, num_slots = held_after(lanes, num_lanes, siblings_share)
        assert len(nodes) <= num_slots <= 2 * math.log2(len(lanes)) + 1
        if lanes.start % (1 << (len(lanes) - 1).bit_length()) == 0:
            assert num_slots <= math.ceil(math.log2(len(lanes))) + 1
        if len(lanes) == 1:
            assert num_slots == 1  # as many ranks as lanes need no extra gradient buffer


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 100), st.booleans())
def test_a_rank_has_buffers_for_any_run_that_it_may_ever_own(data: st.DataObject, num_lanes: int, kept_apart: bool) -> None:
    lanes = Lanes(num_lanes, 1, num_lanes)
    max_lanes = data.draw(st.integers(1, num_lanes - 1))  # at least two ranks, all with lanes
    first = data.draw(st.integers(0, num_lanes - 1))
    mine = range(first, data.draw(st.integers(first + 1, min(num_lanes, first + max_lanes))))
    fixed = slots_needed(lanes, mine, 0, static=True, kept_apart=kept_apart)
    assert fixed == held_after(mine, num_lanes, not kept_apart)[1]
    slots = slots_needed(lanes, mine, max_lanes, static=True, kept_apart=kept_apart)
    for start in range(num_lanes):
        for stop in range(start + 1, min(num_lanes, start + max_lanes) + 1):
            assert held_after(range(start, stop), num_lanes, not kept_apart)[1] <= slots, range(start, stop)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 100), st.integers(1, 8), st.booleans())
def test_a_thief_asks_for_room_and_never_overflows(data: st.DataObject, num_lanes: int, ranks: int, kept_apart: bool) -> None:
    """It computes any prefix of its own range, then any lanes, each one only while fewer nodes than slots are held."""
    lanes = Lanes(num_lanes, 1, num_lanes)
    mine = lanes.of_rank(data.draw(st.integers(0, ranks - 1)), ranks)
    slots = slots_needed(lanes, mine, 0, static=False, kept_apart=kept_apart)
    own = mine[: data.draw(st.integers(0, len(mine)))]
    tree_sum = TreeSum(num_lanes, siblings_share=not kept_apart)
    for i, lane in enumerate([*own, *data.draw(st.permutations(sorted(set(range(num_lanes)) - set(own))))]):
        if i >= len(own) and len(tree_sum.nodes) >= slots:
            break
        tree_sum.open(lane)
        tree_sum.close(lane)
        assert tree_sum.num_slots <= slots
    assert len(own) == num_lanes or slots > len(held_after(own, num_lanes, not kept_apart)[0])  # space for at least one


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 5, 7, 8, 11, 12, 16, 37, 64, 100])
def test_close_to_the_exact_sum(num_lanes: int) -> None:
    for seed in range(20):
        values = gradients(num_lanes, seed)
        found = reference(values).astype(np.float64)
        exact = values.astype(np.float64).sum(axis=0)
        bound = (math.log2(num_lanes) + 1) * 2.0**-24 * np.abs(values.astype(np.float64)).sum(axis=0)
        assert (np.abs(found - exact) <= bound).all()


def test_the_values_do_tell_orders_apart() -> None:
    values = gradients(11, seed=1)
    in_order = np.add.accumulate(values, axis=0, dtype=np.float32)[-1]
    assert not np.array_equal(in_order, reference(values))


@given(st.integers(1, 300), st.booleans())
def test_one_rank_with_all_lanes_is_left_with_the_sum_in_its_first_slot(num_lanes: int, siblings_share: bool) -> None:
    assert held_after(range(num_lanes), num_lanes, siblings_share)[0] == {((num_lanes - 1).bit_length(), 0): 0}


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([(0, 0), (0, 2)], "each of 3 lanes must occur once"),
        ([(1, 0)], "each of 3 lanes must occur once"),
        ([], "each of 3 lanes must occur once"),
        ([(1, 0), (0, 1), (0, 2)], "lane 1 occurs twice"),
        ([(1, 0), (1, 1), (2, 0)], "lane 0 occurs twice"),
        ([(0, 1), (0, 1)], "lane 1 occurs twice"),
    ],
)
def test_lanes_that_are_missing_or_twice_are_refused(nodes: list[Node], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fold_all([(node, i) for i, node in enumerate(nodes)], 3)

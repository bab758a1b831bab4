"""Laws of the tree over lanes: one sum, bit for bit, however the lanes lie over ranks; few buffers; few roundings."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidp.comm.tree import LanePlan, Node, addition_program, num_slots, plan
from mpidp.lanes import Lanes

Cut = tuple[int, list[range]]  # number of lanes, those of each rank


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """Any number of lanes, cut at any places into consecutive runs (some empty)."""
    num_lanes = draw(st.integers(1, 150))
    inner = sorted(draw(st.lists(st.integers(0, num_lanes), max_size=12)))
    edges = [0, *inner, num_lanes]
    return num_lanes, [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def gradients(num_lanes: int, seed: int) -> np.ndarray:
    """(num_lanes, 5) float32 of very different sizes and signs: any other order of addition gives other bits."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((num_lanes, 5)) * 10.0 ** rng.integers(-4, 5, (num_lanes, 5))).astype(np.float32)


def reference(values: np.ndarray, level: int | None = None, index: int = 0) -> np.ndarray:
    """The definition: node (k, i) is (k-1, 2i) + (k-1, 2i+1), or its left child where the right one has no lane."""
    level = (len(values) - 1).bit_length() if level is None else level
    if level == 0:
        return values[index]
    left = reference(values, level - 1, 2 * index)
    if (2 * index + 1) << (level - 1) >= len(values):
        return left
    return left + reference(values, level - 1, 2 * index + 1)


def lanes_of(node: Node, num_lanes: int) -> list[int]:
    level, index = node
    return list(range(index << level, min((index + 1) << level, num_lanes)))


def fold(lanes: range, plans: list[LanePlan], values: np.ndarray) -> tuple[dict[int, np.ndarray], dict[int, list[int]]]:
    """Carry a rank's plan out; slots and the lanes in each. A slot in use is never begun anew, nor an empty one read."""
    slots: dict[int, np.ndarray] = {}
    holds: dict[int, list[int]] = {}
    for lane, step in zip(lanes, plans, strict=True):
        if step.fresh:
            assert step.slot not in holds, "a slot that still holds a sum is zeroed"
            slots[step.slot], holds[step.slot] = values[lane].copy(), [lane]
        else:
            slots[step.slot] += values[lane]
            holds[step.slot].append(lane)
        for into, source in step.folds:
            slots[into] += slots[source]
            holds[into] += holds.pop(source)
    return slots, holds


def run_program(program: list[tuple[int, int] | None], slots: list[dict[int, np.ndarray]]) -> np.ndarray:
    stack: list[np.ndarray] = []
    for step in program:
        if step is None:
            right = stack.pop()
            stack[-1] = stack[-1] + right
        else:
            stack.append(slots[step[0]][step[1]])
    assert len(stack) == 1
    return stack[0]


@settings(max_examples=300, deadline=None)
@given(cuts(), st.booleans(), st.integers(0, 2**32))
def test_any_cut_gives_the_bits_of_the_reference(cut: Cut, siblings_share: bool, seed: int) -> None:
    num_lanes, of_rank = cut
    values = gradients(num_lanes, seed)
    slots, nodes = [], []
    for lanes in of_rank:
        plans, left = plan(lanes, num_lanes, siblings_share)
        held, holds = fold(lanes, plans, values)
        assert holds == {j: lanes_of(node, num_lanes) for j, node in enumerate(left)}
        slots.append(held)
        nodes.append(left)
    program = addition_program(nodes, num_lanes)
    pushed = [step for step in program if step is not None]
    assert len(set(pushed)) == len(pushed) == sum(map(len, nodes))
    assert sorted(lane for r, j in pushed for lane in lanes_of(nodes[r][j], num_lanes)) == list(range(num_lanes))
    np.testing.assert_array_equal(run_program(program, slots).view(np.int32), reference(values).view(np.int32))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.booleans())
def test_few_buffers(num_lanes: int, ranks: int, siblings_share: bool) -> None:
    ranks = min(ranks, num_lanes)
    for rank in range(ranks):
        lanes = Lanes(num_lanes, 1, num_lanes).of_rank(rank, ranks)
        plans, left = plan(lanes, num_lanes, siblings_share)
        assert num_slots(plans) <= 2 * math.log2(len(lanes)) + 1
        assert len(left) <= num_slots(plans)
        assert {p.slot for p in plans} <= set(range(num_slots(plans)))
        if len(lanes) == 1:
            assert num_slots(plans) == 1  # as many ranks as lanes: no extra gradient buffer


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 5, 7, 8, 11, 12, 16, 37, 64, 100])
def test_close_to_the_exact_sum(num_lanes: int) -> None:
    for seed in range(20):
        values = gradients(num_lanes, seed)
        for ranks in {1, 2, 3, num_lanes} & set(range(1, num_lanes + 1)):
            slots, nodes = [], []
            for rank in range(ranks):
                lanes = Lanes(num_lanes, 1, num_lanes).of_rank(rank, ranks)
                plans, left = plan(lanes, num_lanes, siblings_share=True)
                slots.append(fold(lanes, plans, values)[0])
                nodes.append(left)
            found = run_program(addition_program(nodes, num_lanes), slots).astype(np.float64)
            exact = values.astype(np.float64).sum(axis=0)
            bound = (math.log2(num_lanes) + 1) * 2.0**-24 * np.abs(values.astype(np.float64)).sum(axis=0)
            assert (np.abs(found - exact) <= bound).all()


def test_the_values_do_tell_orders_apart() -> None:
    values = gradients(11, seed=1)
    in_order = np.add.accumulate(values, axis=0, dtype=np.float32)[-1]
    assert not np.array_equal(in_order, reference(values))


@given(st.integers(1, 300), st.booleans())
def test_one_rank_with_all_lanes_is_left_with_the_sum_in_its_first_slot(num_lanes: int, siblings_share: bool) -> None:
    _, left = plan(range(num_lanes), num_lanes, siblings_share)
    assert left == [((num_lanes - 1).bit_length(), 0)]


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([[(0, 0)], [(0, 2)]], "lane 1 belongs to no rank"),
        ([[(1, 0)], [(0, 1), (0, 2)]], "overlap"),
        ([[(1, 0), (1, 1)], [(2, 0)]], "overlap"),
    ],
)
def test_lanes_that_are_missing_or_twice_are_refused(nodes: list[list[Node]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        addition_program(nodes, 3)

"""Laws of sharded sums: rounds add every micro-batch once in the order of the tree, and need few gradients; every element of the
layout has one owner."""

from __future__ import annotations

import math
from functools import reduce

import pytest
import torch

from mpidp.data.lanes import Lanes
from mpidp.reducers.buckets import FlatLayout
from mpidp.reducers.rounds import Place, plan_rounds, slots_of
from mpidp.reducers.sharded_sum import pack
from mpidp.reducers.tree_order import TreeSum
from mpidp.reducers.units import overlap_of, units_of
from tests.tiny import small_blocks

SIZES = (1, 2, 3, 4, 5, 8)


def by_tree(lanes: Lanes) -> str:
    """Return the sum of all micro-batches as an expression, in the order of level 0 on one rank."""
    tree_sum, slots = TreeSum(lanes.num_lanes, siblings_share=False), dict[int, str]()
    for lane in range(lanes.num_lanes):
        slot, _ = tree_sum.open(lane)
        slots[slot] = reduce("({}+{})".format, map(str, lanes.micro_batches(lane)))
        for into, source in tree_sum.close(lane):
            slots[into] = f"({slots[into]}+{slots[source]})"
    return slots[0]


def by_rounds(lanes: Lanes, size: int) -> str:
    """Return the same expression for `size` ranks."""
    values: dict[Place, str] = {}
    for number, one in enumerate(plan_rounds(lanes, size)):
        values |= {("row", q): str(number * size + q) for q in range(one.rows)}
        for into, source in one.additions:
            values[into] = f"({values[into]}+{values[source]})"
        kept: dict[Place, str] = {("slot", slot): values["row", row] for slot, row in one.kept}
        values = {place: value for place, value in values.items() if place[0] == "slot"} | kept
    return values["slot", 0]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8, 13, 16, 29, 64])
def test_rounds_add_in_the_order_of_the_tree(count: int) -> None:
    for num_lanes in {1, min(2, count), min(3, count), -(-count // 2), count}:
        lanes = Lanes(count, 1, num_lanes)
        for size in SIZES:
            assert by_rounds(lanes, size) == by_tree(lanes), (num_lanes, size)


def test_owners_store_few_gradients() -> None:
    for count in (1, 2, 4, 8, 16, 32, 64):
        for size in (1, 2, 4, 8):
            rounds = -(-count // size)
            assert slots_of(plan_rounds(Lanes(count, 1, count), size)) == max(1, math.ceil(math.log2(rounds)))


def test_every_element_has_one_owner() -> None:
    sizes = {"embedding.weight": (29, 8), "blocks.0.a": (3, 50), "blocks.0.b": (7,), "blocks.1.a": (), "head.weight": (100, 11)}
    layout = FlatLayout([(name, torch.nn.Parameter(torch.zeros(size))) for name, size in sizes.items()])
    with small_blocks(64):
        for size in SIZES:
            units = units_of(layout, size, lambda name: 0)
            assert [unit.name for unit in units] == ["head", "blocks.1", "blocks.0", "embedding"]
            assert sum(unit.length for unit in units) == layout.num_elements
            for unit in units:
                assert [e for part in unit.parts for e in part] == list(range(unit.length))
                for member in unit.members:
                    runs = [unit.run(member, rank) for rank in range(size)]
                    assert [e for run in runs for e in run] == list(member.range)
                    values = torch.arange(member.parameter.numel()).float()
                    for rank, run in enumerate(runs):
                        mine = values[run.start - member.offset : run.stop - member.offset]
                        for entry in unit.entries_of_run(member, mine, rank, "a").values():
                            where = tuple(slice(a, a + n) for a, n in zip(entry.place, entry.tensor.shape, strict=True))
                            assert entry.tensor.numel() == 0 or torch.equal(
                                entry.tensor, values.view(member.parameter.shape)[where]
                            )


def test_what_is_sent_is_zero_where_there_is_no_gradient() -> None:
    out = torch.full((6,), float("nan"))
    pack(out, range(2, 8), [(range(4), torch.tensor([1.0, 2.0, -0.0, 4.0])), (range(6, 7), torch.tensor([7.0]))])
    assert out.tolist() == [0.0, 4.0, 0.0, 0.0, 7.0, 0.0] and not torch.signbit(out).any()
    assert overlap_of(range(3), range(5, 9)) == range(3, 3) and not overlap_of(range(5, 9), range(3))

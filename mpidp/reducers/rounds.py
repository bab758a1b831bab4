"""Plans the additions of one step in which micro-batches are assigned to the ranks in turn (mesh.shard=2|3). Pure.

In round t, rank q computes micro-batch t P + q, where P is the number of ranks. So the owner of a slice (the rank that adds
this range of the gradient) receives the gradients of consecutive micro-batches. The owner accumulates each lane (a fixed
sequence of micro-batches) in order, and adds two siblings of the tree (tree_order.py) as soon as both are complete. Therefore
the owner stores only the tree nodes that remain after a round. If P is a power of two, it stores at most max(1, log2(number of
rounds)) nodes. The sum has the same bits as with any other distribution of the lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpidp.data.lanes import Lanes
from mpidp.reducers.tree_order import Node, promoted

# ("row", rank): the gradient that this rank sent in the round. ("slot", number): a gradient that the owner stores.
Place = tuple[Literal["row", "slot"], int]


@dataclass(frozen=True)
class RoundPlan:
    """What the owner of a slice does with the gradients of one round (at most one micro-batch from each rank)."""

    rows: int  # number of micro-batches: the first `rows` ranks have one each
    additions: list[tuple[Place, Place]]  # (into, from), in order
    kept: list[tuple[int, int]]  # (slot, row): after the additions, copy the row to the slot


def plan_rounds(lanes: Lanes, size: int) -> list[RoundPlan]:
    """Return the plan of each round of a step on `size` ranks. After the last round, slot 0 holds the sum. Pure."""
    count, found = lanes.num_micro_batches, []
    nodes: dict[Node, Place] = {}
    lane_at: Place | None = None  # where the incomplete lane accumulates
    for start in range(0, count, size):
        additions: list[tuple[Place, Place]] = []
        for row, v in enumerate(range(start, min(count, start + size))):
            here: Place = ("row", row)
            lane = lanes.lane_of(v)
            if lane_at is not None:
                additions.append((lane_at, here))
                here = lane_at
            lane_at = here
            if v == lanes.micro_batches(lane)[-1]:
                lane_at, (level, index) = None, promoted((0, lane), lanes.num_lanes)
                while index % 2:  # the left sibling is complete, because lanes come in order
                    left = nodes.pop((level, index - 1))
                    additions.append((left, here))
                    here, (level, index) = left, promoted((level + 1, index // 2), lanes.num_lanes)
                nodes[level, index] = here
        kept: dict[Place, int] = {}
        taken = {number for kind, number in [*nodes.values(), *filter(None, [lane_at])] if kind == "slot"}
        for place in sorted([*nodes.values(), *filter(None, [lane_at])], key=lambda one: one[1]):
            if place[0] == "row":
                kept[place] = next(slot for slot in range(count) if slot not in taken)
                taken.add(kept[place])
        nodes = {node: ("slot", kept[place]) if place in kept else place for node, place in nodes.items()}
        lane_at = ("slot", kept[lane_at]) if lane_at in kept else lane_at
        found.append(RoundPlan(min(size, count - start), additions, [(slot, row) for (_, row), slot in kept.items()]))
    assert list(nodes.values()) == [("slot", 0)]
    return found


def slots_of(rounds: list[RoundPlan]) -> int:
    """Return the number of gradients (slots) that an owner stores. Pure."""
    return 1 + max(slot for one in rounds for slot, _ in one.kept)

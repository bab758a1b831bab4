"""The order in which lanes are added: a fixed binary tree, so that the sum does not depend on who adds first. Pure.

Node (k, i) is the sum of lanes [i 2^k, (i+1) 2^k) that exist; its value is (k-1, 2i) + (k-1, 2i+1), or the left child
alone where the right one has no lane. Float32 addition is commutative but not associative: with the shape of the tree
fixed by the number of lanes L, the same bits come out however the lanes are shared out over ranks. At most ceil(log2 L)
roundings lie on the path of any lane.
"""

from __future__ import annotations

from dataclasses import dataclass

Node = tuple[int, int]  # (level, index)


@dataclass(frozen=True)
class LanePlan:
    """Where one lane's gradient goes and what is folded after it; slots are a rank's gradient buffers, used as a stack."""

    slot: int  # the lane accumulates here
    fresh: bool  # the slot must be zeroed first; else the lane adds onto its left sibling
    folds: tuple[tuple[int, int], ...]  # then, in order: slot[into] += slot[from]


def _settle(stack: list[Node], num_lanes: int) -> int:
    """Merge finished siblings on top of the stack; returns how many merges of two nodes that took."""
    merges, top_level = 0, (num_lanes - 1).bit_length()
    while True:
        level, index = stack[-1]
        if index % 2 == 1 and len(stack) > 1 and stack[-2] == (level, index - 1):
            stack[-2:] = [(level + 1, index // 2)]
            merges += 1
        elif index % 2 == 0 and level < top_level and (index + 1) << level >= num_lanes:
            stack[-1] = (level + 1, index // 2)  # no lane on the right: the node is its left child
        else:
            return merges


def plan(lanes: range, num_lanes: int, siblings_share: bool) -> tuple[list[LanePlan], list[Node]]:
    """How a rank folds its consecutive lanes, and the nodes it is left with, left to right (slot j holds node j).

    siblings_share: lanes are single micro-batches, so a right leaf may accumulate straight onto its left sibling, which
    is the very addition that the tree asks for. Independent.
    """
    stack: list[Node] = []
    plans = []
    for lane in lanes:
        share = siblings_share and lane % 2 == 1 and bool(stack) and stack[-1] == (0, lane - 1)
        slot = len(stack) - 1 if share else len(stack)
        stack.append((0, lane))
        depth = len(stack) - 1
        merges = _settle(stack, num_lanes)
        folds = [(depth - 1 - step, depth - step) for step in range(merges)]
        plans.append(LanePlan(slot, not share, tuple(folds[1:] if share else folds)))
    return plans, stack


def num_slots(plans: list[LanePlan]) -> int:
    """Gradient buffers that the plan touches: at most 2 log2(lanes of the rank) + 1, and log2 + 1 for an aligned run."""
    return 1 + max((p.slot for p in plans), default=0)


def addition_program(nodes_of_rank: list[list[Node]], num_lanes: int) -> list[tuple[int, int] | None]:
    """The rest of the tree over what all ranks are left with, as a stack program: (rank, slot) pushes, None adds two.

    Raises ValueError when the nodes do not cover every lane exactly once. Independent.
    """
    where = {node: (rank, slot) for rank, nodes in enumerate(nodes_of_rank) for slot, node in enumerate(nodes)}
    program: list[tuple[int, int] | None] = []

    def visit(level: int, index: int) -> bool:
        if (level, index) in where:
            program.append(where[level, index])
            return True
        if level == 0:
            if index < num_lanes:
                raise ValueError(f"lane {index} belongs to no rank")
            return False
        left, right = visit(level - 1, 2 * index), visit(level - 1, 2 * index + 1)
        if left and right:
            program.append(None)
        return left or right

    visit((num_lanes - 1).bit_length(), 0)
    if sum(step is not None for step in program) != len(where):
        raise ValueError("the ranks' nodes overlap")
    return program

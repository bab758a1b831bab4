"""The order in which lanes are added: a fixed binary tree, so that the sum does not depend on who adds first. Pure.

Node (k, i) is the sum of lanes [i 2^k, (i+1) 2^k) that exist; its value is (k-1, 2i) + (k-1, 2i+1), or the left child
alone where the right one has no lane. Float32 addition is commutative but not associative: with the shape of the tree
fixed by the number of lanes L, the same bits come out however the lanes are shared out over ranks, in whatever order they
are computed. At most ceil(log2 L) roundings lie on the path of any lane.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

Node = tuple[int, int]  # (level, index)
Place = TypeVar("Place")  # where a node's value lies


def promoted(node: Node, num_lanes: int) -> Node:
    """The highest node with the same value: one without a right sibling is its parent."""
    level, index = node
    while index % 2 == 0 and level < (num_lanes - 1).bit_length() and (index + 1) << level >= num_lanes:
        level, index = level + 1, index // 2
    return level, index


class TreeSum:
    """Where each lane's gradient goes, and what is added to what after it, for lanes in any order. Independent.

    Slots are a rank's gradient buffers. Siblings that the rank holds both are added at once, so few slots are needed: at
    most log2 + 1 for an aligned run of lanes, 2 log2 + 1 for any run.
    """

    def __init__(self, num_lanes: int, siblings_share: bool) -> None:
        """siblings_share: lanes are single micro-batches, so a leaf may accumulate straight onto its sibling, which is the
        very addition that the tree asks for."""
        self.num_lanes, self.siblings_share = num_lanes, siblings_share
        self.nodes: dict[Node, int] = {}  # what the rank holds, and in which slot
        self.num_slots = 0  # touched so far
        self._slot_of: dict[int, int] = {}  # lanes begun and not done

    def open(self, lane: int) -> tuple[int, bool]:
        """(slot, fresh): the lane accumulates there; a fresh slot must be zeroed first, else it holds the sibling."""
        sibling = self.nodes.pop((0, lane ^ 1), None) if self.siblings_share else None
        slot = self._free() if sibling is None else sibling
        self._slot_of[lane] = slot
        if sibling is not None:
            self._slot_of[lane ^ 1] = slot
        self.num_slots = max(self.num_slots, slot + 1)
        return slot, sibling is None

    def close(self, lane: int) -> list[tuple[int, int]]:
        """The lane is in: the additions slot[into] += slot[from] that follow, in order."""
        slot, node = self._slot_of.pop(lane), (0, lane)
        if self._slot_of.pop(lane ^ 1, None) is not None:
            node = (1, lane // 2)
        folds: list[tuple[int, int]] = []
        while True:
            level, index = promoted(node, self.num_lanes)
            other = self.nodes.pop((level, index ^ 1), None)
            if other is None:
                self.nodes[level, index] = slot
                return folds
            folds.append((min(slot, other), max(slot, other)))
            slot, node = min(slot, other), (level + 1, index // 2)

    def _free(self) -> int:
        taken = {*self.nodes.values(), *self._slot_of.values()}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)


def held_after(lanes: Iterable[int], num_lanes: int, siblings_share: bool) -> tuple[dict[Node, int], int]:
    """(nodes and their slots, slots touched) of a rank that computes these lanes in this order. Independent."""
    tree_sum = TreeSum(num_lanes, siblings_share)
    for lane in lanes:
        tree_sum.open(lane)
        tree_sum.close(lane)
    return tree_sum.nodes, tree_sum.num_slots


def fold(held: Sequence[tuple[Node, Place]], num_lanes: int) -> tuple[list[tuple[Place, Place]], list[tuple[Node, Place]]]:
    """As much of the tree as these nodes allow: additions (into, from) in order, and the nodes left over, left to right.

    Raises ValueError when two nodes hold the same lane. Independent.
    """
    additions: list[tuple[Place, Place]] = []
    stack: list[tuple[Node, Place]] = []
    covered = 0
    for node, place in sorted(held, key=lambda one: one[0][1] << one[0][0]):
        if node[1] << node[0] < covered:
            raise ValueError(f"lane {node[1] << node[0]} is there twice")
        covered = (node[1] + 1) << node[0]
        stack.append((promoted(node, num_lanes), place))
        while len(stack) > 1 and stack[-1][0][1] % 2 == 1 and stack[-2][0] == (stack[-1][0][0], stack[-1][0][1] - 1):
            (_, right), ((level, index), left) = stack.pop(), stack.pop()
            additions.append((left, right))
            stack.append((promoted((level + 1, index // 2), num_lanes), left))
    return additions, stack


def fold_all(held: Sequence[tuple[Node, Place]], num_lanes: int) -> tuple[list[tuple[Place, Place]], Place]:
    """The whole tree: additions in order and where the sum then lies. ValueError when a lane is missing. Independent."""
    additions, left_over = fold(held, num_lanes)
    if [node for node, _ in left_over] != [((num_lanes - 1).bit_length(), 0)]:
        raise ValueError(f"not every one of {num_lanes} lanes is there once: left with {[node for node, _ in left_over]}")
    return additions, left_over[0][1]

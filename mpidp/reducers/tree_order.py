"""Defines the order in which the gradients of lanes (fixed sequences of micro-batches) are added, by a fixed binary tree.
Pure.

Node (k, i) is the sum of the existing lanes with numbers in [i 2^k, (i+1) 2^k). It is the sum of its children (k-1, 2i) and
(k-1, 2i+1). If the right child has no lanes, the node equals its left child. Float32 addition is commutative but not
associative. The shape of the tree depends only on the number of lanes L. Therefore the bits of the sum do not depend on which
rank computes a lane, or on the order in which lanes are computed. The gradient of a lane is rounded at most ceil(log2 L) times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

Node = tuple[int, int]  # (level, index)
Place = TypeVar("Place")  # the location of a node's value


def promoted(node: Node, num_lanes: int) -> Node:
    """Return the highest node with the same value as `node`. A node without a right sibling equals its parent. Pure."""
    level, index = node
    while index % 2 == 0 and level < (num_lanes - 1).bit_length() and (index + 1) << level >= num_lanes:
        level, index = level + 1, index // 2
    return level, index


class TreeSum:
    """Chooses the slot of each lane of one rank, and the additions that follow each lane. Lanes may come in any order.
    Independent.

    Slots are a rank's gradient buffers. Two sibling nodes on the same rank are added immediately. An aligned range of n lanes
    therefore needs at most log2(n) + 1 slots. Any other range needs at most 2 log2(n) + 1 slots.
    """

    def __init__(self, num_lanes: int, siblings_share: bool) -> None:
        """num_lanes: the number of lanes in a step. siblings_share: whether a lane accumulates directly into the slot of its
        sibling. If every lane is a single micro-batch, sharing does not change the bits of the sum. Otherwise it is not
        allowed."""
        self.num_lanes, self.siblings_share = num_lanes, siblings_share
        self.nodes: dict[Node, int] = {}  # nodes on this rank, and their slots
        self.num_slots = 0  # slots used so far
        self._slot_of: dict[int, int] = {}  # slots of the lanes that have begun but not ended

    def open(self, lane: int) -> tuple[int, bool]:
        """Begin a lane. Return (the slot in which the lane accumulates, whether the slot is fresh). The caller must zero a fresh
        slot. A slot that is not fresh holds the gradient of the sibling lane."""
        sibling = self.nodes.pop((0, lane ^ 1), None) if self.siblings_share else None
        slot = self._free() if sibling is None else sibling
        self._slot_of[lane] = slot
        if sibling is not None:
            self._slot_of[lane ^ 1] = slot
        self.num_slots = max(self.num_slots, slot + 1)
        return slot, sibling is None

    def close(self, lane: int) -> list[tuple[int, int]]:
        """End a lane. Return the additions (into, from) that the caller must now make, in order. An addition is slot[into] +=
        slot[from]."""
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
    """Return ({node: slot}, number of slots used) after a rank has computed `lanes` in this order. Independent."""
    tree_sum = TreeSum(num_lanes, siblings_share)
    for lane in lanes:
        tree_sum.open(lane)
        tree_sum.close(lane)
    return tree_sum.nodes, tree_sum.num_slots


def fold(held: Sequence[tuple[Node, Place]], num_lanes: int) -> tuple[list[tuple[Place, Place]], list[tuple[Node, Place]]]:
    """Combine the nodes in `held` as far as the tree allows. held: (node, place of the node's value) of each node. Return
    (additions, remaining nodes). The additions are (into, from), in order. The remaining nodes are (node, place), from left to
    right. Raises ValueError if two nodes contain the same lane. Independent."""
    additions: list[tuple[Place, Place]] = []
    stack: list[tuple[Node, Place]] = []
    covered = 0
    for node, place in sorted(held, key=lambda one: one[0][1] << one[0][0]):
        if node[1] << node[0] < covered:
            raise ValueError(f"lane {node[1] << node[0]} occurs twice")
        covered = (node[1] + 1) << node[0]
        stack.append((promoted(node, num_lanes), place))
        while len(stack) > 1 and stack[-1][0][1] % 2 == 1 and stack[-2][0] == (stack[-1][0][0], stack[-1][0][1] - 1):
            (_, right), ((level, index), left) = stack.pop(), stack.pop()
            additions.append((left, right))
            stack.append((promoted((level + 1, index // 2), num_lanes), left))
    return additions, stack


def fold_all(held: Sequence[tuple[Node, Place]], num_lanes: int) -> tuple[list[tuple[Place, Place]], Place]:
    """Combine the nodes in `held` into the whole tree. Return (additions in order, place of the sum). Raises ValueError if a lane
    is missing or occurs twice. Independent."""
    additions, left_over = fold(held, num_lanes)
    if [node for node, _ in left_over] != [((num_lanes - 1).bit_length(), 0)]:
        raise ValueError(f"each of {num_lanes} lanes must occur once, but these nodes remain: {[node for node, _ in left_over]}")
    return additions, left_over[0][1]

"""Schedules of partial averaging: which ranks average with each other in round t. Pure.

| group | in round t | source |
|---|---|---|
| all | all ranks | |
| node | the ranks of each node | hierarchical averaging |
| rotating | groups of `group_size` neighbours on a ring; the groups shift by one rank each round | |
| pairs | a random perfect matching, seeded by t; one of an odd number of ranks stays alone | Lian 2018 (AD-PSGD), section 3 |
| exponential | rank r receives from rank r - 2^(t mod log2 P) | Assran 2019 (SGP), appendix A |

Every round preserves the mean over all ranks, because the weights with which a rank's model is used sum to one. With
`exponential`, after log2 P rounds each rank has received, directly or indirectly, from every other one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

PARTITIONS = ("node", "rotating", "pairs")
GROUPS = ("all", *PARTITIONS, "exponential")


def partition(kind: str, t: int, size: int, nodes: Sequence[Sequence[int]], group_size: int) -> list[tuple[int, ...]]:
    """Return the groups of round t, each a sorted tuple of ranks; every rank is in exactly one. Raises ValueError if kind is not
    in PARTITIONS. Independent."""
    if kind == "node":
        return [tuple(ranks) for ranks in nodes]
    if kind == "rotating":
        ring = [(t + place) % size for place in range(size)]
        return [tuple(sorted(ring[at : at + group_size])) for at in range(0, size, group_size)]
    if kind == "pairs":
        ranks = list(range(size))
        random.Random(f"pairs {t}").shuffle(ranks)
        return [tuple(sorted(ranks[at : at + 2])) for at in range(0, size, 2)]
    raise ValueError(f"{kind!r} is not one of {', '.join(PARTITIONS)}")


def hop(t: int, size: int) -> int:
    """Return the distance on the ring to the peer of round t with `exponential`; 0 if there is one rank. Independent."""
    return 2 ** (t % max(1, (size - 1).bit_length())) if size > 1 else 0

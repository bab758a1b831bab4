"""Who averages with whom at round t: schedules of partial aggregation. Pure.

| group | at round t | source |
|---|---|---|
| all | everybody with everybody | |
| node | the ranks of each node | hierarchical averaging |
| rotating | groups of `group_size` neighbours on a ring, which moves on by one rank each round | |
| pairs | a random perfect matching, drawn from t; of an odd number one rank stays alone | Lian 2018 (AD-PSGD), section 3 |
| exponential | rank r hears r - 2^(t mod log2 P); after log2 P rounds it has heard all | Assran 2019 (SGP), appendix A |

Every round keeps the mean over all ranks: each rank's model is given away with weights that sum to one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

PARTITIONS = ("node", "rotating", "pairs")
GROUPS = ("all", *PARTITIONS, "exponential")


def partition(kind: str, t: int, size: int, nodes: Sequence[Sequence[int]], group_size: int) -> list[tuple[int, ...]]:
    """The groups of round t, each of ranks in order; every rank is in one. ValueError for a kind that is none of PARTITIONS.
    Independent."""
    if kind == "node":
        return [tuple(ranks) for ranks in nodes]
    if kind == "rotating":
        ring = [(t + place) % size for place in range(size)]
        return [tuple(sorted(ring[at : at + group_size])) for at in range(0, size, group_size)]
    if kind == "pairs":
        ranks = list(range(size))
        random.Random(f"pairs {t}").shuffle(ranks)
        return [tuple(sorted(ranks[at : at + 2])) for at in range(0, size, 2)]
    raise ValueError(f"{kind!r} is none of {', '.join(PARTITIONS)}")


def hop(t: int, size: int) -> int:
    """How far away on the ring the peer of round t is, under `exponential`; 0 for one rank alone. Independent."""
    return 2 ** (t % max(1, (size - 1).bit_length())) if size > 1 else 0

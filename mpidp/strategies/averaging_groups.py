"""Groups of ranks that average their models in round t, which is the t-th average of the run. Pure.

| group | in round t | source |
|---|---|---|
| all | all ranks | |
| node | the ranks of each node | hierarchical averaging |
| rotating | groups of `group_size` neighbours on a ring; the groups shift by one rank each round | |
| pairs | random pairs, seeded by t; if the number of ranks is odd, one rank does not average | Lian 2018 (AD-PSGD), section 3 |
| exponential | rank r averages its model with that of rank r - 2^(t mod ceil(log2 P)) | Assran 2019 (SGP), appendix A |

P is the number of ranks. No round changes the mean of the models over all ranks. With `exponential`, every model has influenced
every rank after ceil(log2 P) rounds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

PARTITIONS = ("node", "rotating", "pairs")
GROUPS = ("all", *PARTITIONS, "exponential")


def partition(kind: str, t: int, size: int, nodes: Sequence[Sequence[int]], group_size: int) -> list[tuple[int, ...]]:
    """Return the groups of round `t`, which is the average with number `t`. A group is a sorted tuple of ranks, and every rank
    is in exactly one group. `kind`: node, rotating or pairs. `size`: number of ranks. `nodes`: the ranks of each node.
    `group_size`: number of ranks in a group, for rotating. Raises ValueError for any other `kind`. Independent."""
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
    """Return h for round `t` (average number `t`) of `exponential`: rank r receives the model of rank r - h. h is 0 if there
    is only one rank. Independent."""
    return 2 ** (t % max(1, (size - 1).bit_length())) if size > 1 else 0

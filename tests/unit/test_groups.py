"""Laws of partial aggregation: every rank is in one group, no round changes the mean, and information spreads to all ranks."""

from __future__ import annotations

import numpy as np
import pytest

from mpidp.strategies.averaging_groups import GROUPS, PARTITIONS, hop, partition


def nodes(size: int) -> list[range]:
    return [range(size // 2), range(size // 2, size)]


def weights(kind: str, t: int, size: int) -> np.ndarray:
    """Return the mixing matrix (size, size) of round t: row r has the weights of all ranks' models in rank r's new model."""
    found = np.zeros((size, size))
    if kind == "exponential":
        for r in range(size):
            found[r, r] += 0.5
            found[r, (r - hop(t, size)) % size] += 0.5
    for group in partition(kind, t, size, nodes(size), 3) if kind in PARTITIONS else []:
        for r in group:
            found[r, list(group)] = 1 / len(group)
    return found


@pytest.mark.parametrize("kind", GROUPS[1:])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 13])
def test_no_round_changes_the_mean(kind: str, size: int) -> None:
    for t in range(20):
        w = weights(kind, t, size)
        assert np.allclose(w.sum(0), 1) and np.allclose(w.sum(1), 1), (t, w)


@pytest.mark.parametrize("kind", [kind for kind in GROUPS[1:] if kind != "node"])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 13])
def test_in_time_all_hear_of_all(kind: str, size: int) -> None:
    mixed = np.eye(size)
    for t in range(1, 60):
        mixed = weights(kind, t, size) @ mixed
    assert np.abs(mixed - 1 / size).max() < 0.02


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_the_exponential_graph_is_exact_after_log2_rounds(size: int) -> None:
    mixed, rounds = np.eye(size), size.bit_length() - 1
    for t in range(rounds):
        mixed = weights("exponential", t, size) @ mixed
    assert np.allclose(mixed, 1 / size)


def test_one_rank_is_alone() -> None:
    assert hop(3, 1) == 0
    assert partition("pairs", 5, 1, [], 2) == [(0,)]
    with pytest.raises(ValueError, match="not one of node, rotating, pairs"):
        partition("all", 0, 4, [], 2)

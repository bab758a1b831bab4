"""Laws of from_dataset: every item exactly once per epoch at any number of ranks, in the order given by the seed; the position is
one integer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidp.data import from_dataset
from mpidp.data.dataset import Items
from mpidp.errors import DataError, UsageError


def of_ranks(items: Items, batch: int, ranks: int) -> list[list[int]]:
    """Return what each rank reads of a batch with evenly distributed lanes."""
    lanes = [items.lanes.of_rank(rank, ranks) for rank in range(ranks)]
    return [[i for lane in mine for v in items.lanes.micro_batches(lane) for i in items.indices(batch, v)] for mine in lanes]


@settings(deadline=None)
@given(n=st.integers(1, 70), batch=st.integers(1, 20), micro=st.integers(0, 20), ranks=st.integers(1, 5), seed=st.integers(0, 3))
def test_every_item_once_an_epoch(n: int, batch: int, micro: int, ranks: int, seed: int) -> None:
    items = from_dataset(range(n), batch, min(micro, batch), seed)
    for epoch in range(2):
        batches = range(epoch * len(items), (epoch + 1) * len(items))
        found = [one for b in batches for part in of_ranks(items, b, min(ranks, items.lanes.num_lanes)) for one in part]
        assert sorted(found) == list(range(n))
        alone = [one for b in batches for one in of_ranks(items, b, 1)[0]]
        assert found == alone  # in the same order, rank after rank
        for b in batches:
            counts = [items.count(b, v) for v in range(items.lanes.num_micro_batches)]
            assert counts == [len(items.indices(b, v)) for v in range(items.lanes.num_micro_batches)]
            assert sum(counts) == (batch if b + 1 < batches.stop else n - (len(items) - 1) * batch)


def order(items: Items, epoch: int) -> list[int]:
    return [one for b in range(epoch * len(items), (epoch + 1) * len(items)) for one in of_ranks(items, b, 1)[0]]


def test_an_order_is_of_its_seed_and_epoch() -> None:
    orders = [order(from_dataset(range(100), 16, seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(one) for one in orders}) == 4 and list(range(100)) not in orders
    assert orders[0] == order(from_dataset(range(100), 16, 5, seed=0), 0)  # the order differs from the distribution over lanes
    assert order(from_dataset(range(100), 16, shuffle=False), 1) == list(range(100))


def test_items_are_collated() -> None:
    pairs = [(torch.full((2,), float(i)), i) for i in range(5)]
    count, (x, y) = from_dataset(pairs, 4, 2, shuffle=False).read(0, 1)
    assert count == 2 and x.tolist() == [[2.0, 2.0], [3.0, 3.0]] and y.tolist() == [2, 3]
    assert from_dataset(pairs, 4, 2, shuffle=False).read(1, 1) == (0, None)
    assert from_dataset(range(5), 4, 2, shuffle=False, collate=tuple).read(1, 0) == (1, (4,))


def test_a_place_is_one_integer_of_one_order() -> None:
    items = from_dataset(range(50), 8, seed=1)
    items.next_batch = 9
    other = from_dataset(range(50), 8, 2, seed=1)  # the order does not depend on the micro-batch size
    other.load_state_dict(items.state_dict())
    assert other.next_batch == 9
    other.load_state_dict({key: value for key, value in items.state_dict().items() if key != "shuffle"})  # of an earlier version
    for wrong in (from_dataset(range(51), 8, seed=1), from_dataset(range(50), 7, seed=1), from_dataset(range(50), 8, seed=2),
                  from_dataset(range(50), 8, seed=1, shuffle=False)):
        with pytest.raises(UsageError, match="saved with other settings"):
            wrong.load_state_dict(items.state_dict())


class Broken:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Any:
        raise OSError(f"{i}.png: truncated")


def test_what_cannot_be_read_is_named() -> None:
    with pytest.raises(DataError, match=r"dataset item 1 \(of 3\): OSError: 1.png: truncated"):
        from_dataset(Broken(), 2, 1, shuffle=False).read(0, 1)
    with pytest.raises(UsageError, match="map-style"):
        from_dataset(iter(range(3)), 2)
    with pytest.raises(DataError, match="no items"):
        from_dataset([], 2)
    with pytest.raises(UsageError, match="micro_batch 3 must be at least 1, and at most global_batch 2"):
        from_dataset(range(9), 2, 3)

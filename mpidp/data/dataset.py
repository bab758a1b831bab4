"""Any map-style dataset in the order, and in the cut, of ours: every item exactly once an epoch at any number of ranks, and a
place in it that is one integer. Independent: it reads what it is asked for, and knows nothing of ranks.

Place k of epoch e is item permute(k) of a Feistel permutation keyed by (seed, e): nothing is held in memory, nothing is
remembered. A global batch is the next `batch` places, cut into micro-batches and lanes as a run's is (mpidp/data/lanes.py); the
last one of an epoch may be short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpidp.data.lanes import Lanes
from mpidp.data.permutation import keys_of, permute
from mpidp.errors import DataError, UsageError


class Items:
    """Micro-batches of a dataset, by (batch, v). Batches count from 0 over all epochs; next_batch is the whole state."""

    def __init__(
        self, dataset: Any, lanes: Lanes, seed: int, shuffle: bool, collate: Callable[[list[Any]], Any] | None
    ) -> None:
        self.dataset, self.lanes, self.seed, self.shuffle = dataset, lanes, seed, shuffle
        self.num_items, self.next_batch = len(dataset), 0
        self._collate = collate
        self._order: tuple[int, list[int]] = (-1, [])  # of the last batch asked for

    def __len__(self) -> int:
        """Global batches an epoch."""
        return -(-self.num_items // self.lanes.global_batch)

    def count(self, batch: int, v: int) -> int:
        """How many items micro-batch v of a global batch has; fewer or none in an epoch's last batch."""
        places, rest = self.lanes.sequences(v), self.num_items - batch % len(self) * self.lanes.global_batch
        return max(0, min(places.stop, rest) - places.start)

    def indices(self, batch: int, v: int) -> list[int]:
        """Those items, in order."""
        if self._order[0] != batch:
            epoch, step = divmod(batch, len(self))
            start = step * self.lanes.global_batch
            at = np.arange(start, min(self.num_items, start + self.lanes.global_batch), dtype=np.uint64)
            if self.shuffle:
                at = permute(at, self.num_items, keys_of(self.seed, "item", epoch))
            self._order = (batch, at.tolist())
        places = self.lanes.sequences(v)
        return self._order[1][places.start : places.stop]

    def read(self, batch: int, v: int) -> tuple[int, Any]:
        """(number of items, they collated) of a micro-batch; (0, None) where it has none. DataError names the item that the
        dataset could not give."""
        found = []
        for i in self.indices(batch, v):
            try:
                found.append(self.dataset[i])
            except Exception as error:
                raise DataError(f"item {i} of {self.num_items} of the dataset: {type(error).__name__}: {error}") from error
        if not found:
            return 0, None
        if self._collate is None:
            from torch.utils.data import default_collate

            self._collate = default_collate
        return len(found), self._collate(found)

    def state_dict(self) -> dict[str, int]:
        """One integer: the next batch. What it is the batch of is said too, so that another is refused."""
        return {"batch": self.next_batch, "items": self.num_items, "global_batch": self.lanes.global_batch, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there, at any number of ranks. UsageError for the place in another order."""
        mine = self.state_dict()
        other = [f"{key} was {state.get(key)}, is {mine[key]}" for key in mine if state.get(key) != mine[key] and key != "batch"]
        if other:
            raise UsageError(f"the dataset's place is of another order: {'; '.join(other)}")
        self.next_batch = int(state["batch"])


def from_dataset(
    dataset: Sequence[Any] | Any, batch: int, micro_batch: int = 0, seed: int = 0, shuffle: bool = True, lanes: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Items:
    """dataset: anything with len() and [i]; batch: items a step over all ranks; micro_batch: items a forward pass, 0: an eighth
    of the batch, so that up to 8 ranks can share it; lanes: as train.lanes; collate: list of items -> what the loop gets, torch's
    default_collate when left out. UsageError, DataError. Independent."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UsageError(
            f"from_dataset needs a map-style dataset, with len(dataset) and dataset[i], and a {type(dataset).__name__} is none: "
            "an iterable has no places to deal out; list(dataset) has, if it fits memory"
        )
    if not len(dataset):
        raise DataError("the dataset has no items")
    try:
        cut = Lanes(batch, micro_batch or -(-batch // 8), lanes)
    except ValueError as error:
        raise UsageError(f"from_dataset(batch={batch}, micro_batch={micro_batch}, lanes={lanes}): {error}") from error
    return Items(dataset, cut, seed, shuffle, collate)

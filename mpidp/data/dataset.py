"""Batches of any map-style dataset. An epoch contains each item exactly once, for any number of ranks. Independent.

If `shuffle` is True, item permute(k) of the dataset is at position k of epoch e. permute() is a Feistel permutation whose key
is computed from (seed, e). A global batch consists of the items at the next `batch` positions. As in training
(mpidp/data/lanes.py), the batch is divided into micro-batches, and consecutive micro-batches form a lane (a unit of work).
The last batch of an epoch may be shorter. The only state is the number of the next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpidp.data.lanes import Lanes
from mpidp.data.permutation import keys_of, permute
from mpidp.errors import DataError, UsageError


class Items:
    """The micro-batches of a dataset. In all methods, `batch` is the number of a global batch, counted from 0 over all epochs,
    and `v` is the index of a micro-batch in this global batch. read(batch, v) returns the micro-batch."""

    def __init__(
        self, dataset: Any, lanes: Lanes, seed: int, shuffle: bool, collate: Callable[[list[Any]], Any] | None
    ) -> None:
        self.dataset, self.lanes, self.seed, self.shuffle = dataset, lanes, seed, shuffle
        self.num_items, self.next_batch = len(dataset), 0
        self._collate = collate
        self._order: tuple[int, list[int]] = (-1, [])  # the number of the last batch read, and the indices of its items

    def __len__(self) -> int:
        """Return the number of global batches per epoch."""
        return -(-self.num_items // self.lanes.global_batch)

    def count(self, batch: int, v: int) -> int:
        """Return the number of items in a micro-batch. In the last batch of an epoch, a micro-batch may have fewer items than
        usual, or none."""
        places, rest = self.lanes.sequences(v), self.num_items - batch % len(self) * self.lanes.global_batch
        return max(0, min(places.stop, rest) - places.start)

    def indices(self, batch: int, v: int) -> list[int]:
        """Return the dataset indices of the items in a micro-batch, in order."""
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
        """Return (number of items, collated items) of a micro-batch. Return (0, None) if the micro-batch is empty.

        If the dataset raises an exception for an item, raises a DataError that names the item.
        """
        found = []
        for i in self.indices(batch, v):
            try:
                found.append(self.dataset[i])
            except Exception as error:
                raise DataError(f"dataset item {i} (of {self.num_items}): {type(error).__name__}: {error}") from error
        if not found:
            return 0, None
        if self._collate is None:
            from torch.utils.data import default_collate

            self._collate = default_collate
        return len(found), self._collate(found)

    def state_dict(self) -> dict[str, int]:
        """Return the number of the next batch, the number of items, the size of a global batch, the seed, and `shuffle`."""
        return {"batch": self.next_batch, "items": self.num_items, "global_batch": self.lanes.global_batch, "seed": self.seed,
                "shuffle": self.shuffle}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the batch whose number is in `state`. The run that made `state` may have had another number of ranks.
        Raises UsageError if the number of items, the size of a global batch, the seed or `shuffle` differs."""
        now = self.state_dict()
        state = {"shuffle": self.shuffle} | state  # earlier versions did not save `shuffle`
        changed = [f"{key} was {state.get(key)}, is {now[key]}" for key in now if state.get(key) != now[key] and key != "batch"]
        if changed:
            raise UsageError(f"the position was saved with other settings ({'; '.join(changed)}). Use the saved settings")
        self.next_batch = int(state["batch"])


def from_dataset(
    dataset: Sequence[Any] | Any, batch: int, micro_batch: int = 0, seed: int = 0, shuffle: bool = True, lanes: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Items:
    """Return the batches of a map-style dataset for mpidp.library.

    `dataset`: an object that supports len(dataset) and dataset[i]. `batch`: number of items per step, over all ranks.
    `micro_batch`: number of items per forward pass. The default 0 means an eighth of the batch, so that up to 8 ranks can
    share a batch. `lanes`: number of lanes (sequences of micro-batches whose gradients are added in a fixed order). The
    default 0 means one lane per micro-batch, up to 64. `collate`: a function that makes a batch from a list of items (default:
    torch's default_collate). Raises UsageError if an argument is invalid, and DataError if there are no items. Independent.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UsageError(
            f"from_dataset needs a map-style dataset with len(dataset) and dataset[i]; {type(dataset).__name__} is not one. "
            "If an iterable dataset fits into memory, pass list(dataset)"
        )
    if not len(dataset):
        raise DataError("the dataset has no items")
    try:
        cut = Lanes(batch, micro_batch or -(-batch // 8), lanes)
    except ValueError as error:
        raise UsageError(f"from_dataset(batch={batch}, micro_batch={micro_batch}, lanes={lanes}): {error}") from error
    return Items(dataset, cut, seed, shuffle, collate)

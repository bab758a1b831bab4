"""Adds rows to the embedding and the head if the vocabulary of the model is larger than that of its initial weights.

Each added row is the mean of the stored rows, as in resize_token_embeddings of transformers. A new token is therefore about as
likely as an average token at first (Hewitt 2021). The added rows do not depend on how the matrices are divided among ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from mpidp.checkpoint.entry import Entry

MATRICES = ("embedding.weight", "head.weight")  # (V, D)
BLOCK = 4096  # rows that are read at a time


class BoxReader(Protocol):
    """A source of parameters, such as a checkpoint or a model folder."""

    def box(self, name: str, entry: Entry) -> Tensor:
        """Return the box that `entry` describes: a range of indices in each dimension of a parameter. `name`: "model/"
        followed by the parameter's name. Independent."""


class AddedRows:
    """Reads parameters from `weights`, and adds rows to the embedding and the head for new token ids. `stored`: the number of
    rows that these two matrices have in `weights`. Independent."""

    def __init__(self, weights: BoxReader, stored: int) -> None:
        self._weights, self._stored = weights, stored
        self._means: dict[str, Tensor] = {}

    def box(self, name: str, entry: Entry) -> Tensor:
        """Return the box (rectangular block) that `entry` describes, as Reader.box() does. The box may contain added rows.
        `name`: "model/" followed by the parameter's name."""
        if name.removeprefix("model/") not in MATRICES:
            return self._weights.box(name, entry)
        columns = (entry.tensor.shape if entry.shape is None else entry.shape)[1]
        (row, column), (count, width) = entry.place, entry.tensor.shape
        there = max(0, min(self._stored - row, count))  # rows of the box that are stored
        found = torch.empty((count, width))
        if there:
            found[:there] = self._read(name, row, there, columns)[:, column : column + width]
        if there < count:
            found[there:] = self._mean(name, columns)[column : column + width]
        return found

    def _read(self, name: str, row: int, count: int, columns: int) -> Tensor:
        wanted = torch.empty((count, columns), device="meta")
        return self._weights.box(name, Entry(wanted, at=(row, 0), shape=(self._stored, columns))).float()

    def _mean(self, name: str, columns: int) -> Tensor:
        if name not in self._means:
            total = torch.zeros(columns, dtype=torch.float64)
            for row in range(0, self._stored, BLOCK):
                total += self._read(name, row, min(BLOCK, self._stored - row), columns).double().sum(0)
            self._means[name] = (total / self._stored).float()
        return self._means[name]


def fits(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether the parameters in `stored` have the names and the shapes of those in `wanted`. The embedding and the head
    may have fewer rows in `stored`. `stored`, `wanted`: {parameter's name: shape}. Pure."""
    return stored.keys() == wanted.keys() and all(
        size == wanted[name] or name in MATRICES and size[1:] == wanted[name][1:] and size[0] < wanted[name][0]
        for name, size in stored.items()
    )

"""The entries of a checkpoint: named global tensors and their distribution over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Layout = Literal["replicated", "sharded", "additive"]


@dataclass(frozen=True)
class Entry:
    """One rank's part of a named global tensor.

    The part is a box that begins at the indices `at` (empty: at the beginning) of a tensor of `shape` (None: the part is the
    whole tensor).

    replicated: all replicas hold the same values; any of them may write the tensor.
    sharded: only this rank holds its part.
    additive: the global value is the sum over ranks (residuals of error feedback). If as many ranks load as wrote, each gets its
    own part; otherwise rank 0 gets the sum.
    """

    tensor: Tensor
    layout: Layout = "replicated"
    at: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = None

    @property
    def place(self) -> tuple[int, ...]:
        return self.at or (0,) * self.tensor.dim()

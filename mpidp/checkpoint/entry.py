"""The entries of a checkpoint, which are named global tensors that are distributed over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Layout = Literal["replicated", "sharded", "additive"]


@dataclass(frozen=True)
class Entry:
    """One rank's box of a named global tensor.

    at: the indices in the global tensor at which the box begins. If `at` is empty, the box begins at the first element. shape:
    the shape of the global tensor, or None if the box is the whole tensor. layout is one of:

    replicated: all replicas hold the same values, so any replica may write the tensor. sharded: only this rank holds the box.
    additive: the global tensor is the sum of the ranks' tensors, which are residuals of error feedback. If the checkpoint is
    loaded on the same number of ranks, each rank gets its own summand. Otherwise rank 0 gets the sum.
    """

    tensor: Tensor
    layout: Layout = "replicated"
    at: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = None

    @property
    def place(self) -> tuple[int, ...]:
        return self.at or (0,) * self.tensor.dim()

"""The entries of a checkpoint, which are named global tensors that are distributed over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Layout = Literal["replicated", "sharded", "additive"]


@dataclass(frozen=True)
class Entry:
    """One rank's box of a named global tensor.

    at: the indices in the global tensor at which the box begins; empty means at the beginning. shape: the shape of the global
    tensor; None means that the box is the whole tensor. layout is one of:

    replicated: all replicas hold the same values, so any of them may write the tensor. sharded: only this rank holds the box.
    additive: the global tensor is the sum over ranks (residuals of error feedback). If the number of ranks is the same after
    loading, each rank gets its own summand. Otherwise rank 0 gets the sum.
    """

    tensor: Tensor
    layout: Layout = "replicated"
    at: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = None

    @property
    def place(self) -> tuple[int, ...]:
        return self.at or (0,) * self.tensor.dim()

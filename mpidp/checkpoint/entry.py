"""The entries of a checkpoint. An entry is one rank's part of a named global tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Layout = Literal["replicated", "sharded", "additive"]


@dataclass(frozen=True)
class Entry:
    """One rank's box of a named global tensor. A box is a range of indices in each dimension.

    `tensor`: the values of the box. `at`: the indices of the box's first element in the global tensor, or () if all these
    indices are 0. `shape`: the shape of the global tensor, or None if the box is the whole tensor. `layout` is one of:

    replicated: all replicas hold the same values. Any replica may write the tensor.

    sharded: no other rank holds the box.

    additive: the global tensor is the sum of one tensor per rank. Examples are the residuals of a compression. If a checkpoint
    is loaded on as many ranks as wrote it, each rank gets its own tensor back. Otherwise rank 0 gets the sum.
    """

    tensor: Tensor
    layout: Layout = "replicated"
    at: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = None

    @property
    def place(self) -> tuple[int, ...]:
        return self.at or (0,) * self.tensor.dim()

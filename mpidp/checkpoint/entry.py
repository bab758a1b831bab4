"""What a checkpoint is made of: named global tensors, each with how its parts lie over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Layout = Literal["replicated", "sharded", "additive"]


@dataclass(frozen=True)
class Entry:
    """One rank's part of a named global tensor: a box of it, from the indices `at` on (none: from the beginning), of a tensor of
    `shape` (None: it is the whole).

    replicated: all replicas hold the same; who writes it does not matter.
    sharded: this rank alone holds its part.
    additive: the global value is the sum over ranks (residuals of error feedback); loading gives the sum to rank 0, or
    to each its own part where as many ranks load as wrote.
    """

    tensor: Tensor
    layout: Layout = "replicated"
    at: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = None

    @property
    def place(self) -> tuple[int, ...]:
        return self.at or (0,) * self.tensor.dim()

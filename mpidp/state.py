"""What a checkpoint is made of: named global tensors, each with how its parts lie over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Layout = Literal["replicated", "sharded", "additive"]


@dataclass(frozen=True)
class Entry:
    """One rank's part of a named global tensor.

    replicated: every rank holds the same whole; who writes it does not matter.
    sharded: this rank holds [start, start + its length) along `dim` of a tensor of `shape`; None: it holds the whole, alone.
    additive: the global value is the sum over ranks (residuals of error feedback); loading gives the sum to rank 0, or
    to each its own part where as many ranks load as wrote.
    """

    tensor: Tensor
    layout: Layout = "replicated"
    dim: int = 0
    start: int = 0
    shape: tuple[int, ...] | None = None

"""Cuts flat buffers into slices (ranges of elements), and computes the norm of a gradient block by block."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

ALIGN = 64  # elements; every parameter and slice begins at a multiple of ALIGN, so kernels always see the same alignment

NORM_BLOCK = 1 << 12  # elements; the gradient norm is summed over blocks of this size, in order


def round_up(number: int, multiple: int) -> int:
    """Return the smallest integer that is at least `number` and divisible by `multiple`. Pure."""
    return -(-number // multiple) * multiple


def slice_bounds(length: int, size: int, multiple: int = ALIGN) -> list[int]:
    """Divide `length` elements into `size` slices. The start of each slice is divisible by `multiple`. Return the size + 1
    bounds of the slices. Slice r is [bounds[r], bounds[r + 1]). Pure."""
    units = -(-length // multiple)
    return [min(length, r * units // size * multiple) for r in range(size)] + [length]


def squares_of_blocks(flat: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of each norm block (NORM_BLOCK elements): (blocks,), float64. `flat`: (n,), n a multiple of
    NORM_BLOCK. The bits of a block's sum depend only on its elements, and not on the number of threads. Independent."""
    rows = torch.linalg.vector_norm(flat.view(-1, 256), dim=1)  # short rows: torch splits a single long row over threads
    return rows.double().square().view(-1, NORM_BLOCK // 256).sum(1)


def sum_in_order(values: Iterable[float]) -> float:
    """Return the float64 sum of the values, added one after the other. From Python 3.12 on, the built-in sum() instead corrects
    rounding errors, so its bits can differ. Pure."""
    return functools.reduce(operator.add, values, 0.0)


def norm_of_squares(squares: Tensor) -> float:
    """Return the square root of the sum of `squares`, or 0 if the sum is negative. `squares`: (blocks,), float64. The elements
    are added in order. Independent.

    The root is computed with math.sqrt, which is rounded correctly. The last bit of torch.sqrt can differ.
    """
    return math.sqrt(squares.cpu().cumsum(0)[-1].clamp(min=0.0))


def global_norm(flat: Tensor) -> float:
    """Return the L2 norm of a flat gradient. `flat`: (n,), n a multiple of NORM_BLOCK. Sums of more than 256 elements are
    computed in float64. The result does not depend on the number of ranks or threads. Independent."""
    return norm_of_squares(squares_of_blocks(flat))

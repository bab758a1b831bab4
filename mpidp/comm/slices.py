"""Cuts flat buffers into slices. Computes the norm of a gradient block by block."""

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
    """Return the smallest multiple of `multiple` that is at least `number`. Pure."""
    return -(-number // multiple) * multiple


def slice_bounds(length: int, size: int, multiple: int = ALIGN) -> list[int]:
    """Cut `length` elements into `size` slices at multiples of `multiple`, and return the size + 1 bounds. Pure."""
    units = -(-length // multiple)
    return [min(length, r * units // size * multiple) for r in range(size)] + [length]


def squares_of_blocks(flat: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of each block of NORM_BLOCK elements: (blocks,), float64. flat: (n,), n a multiple of NORM_BLOCK.
    The bits do not depend on the number of threads, or on which blocks one call computes. Independent."""
    rows = torch.linalg.vector_norm(flat.view(-1, 256), dim=1)  # short rows: torch splits a single long row over threads
    return rows.double().square().view(-1, NORM_BLOCK // 256).sum(1)


def sum_in_order(values: Iterable[float]) -> float:
    """Return the float64 sum of the values, added one after the other. Pure.

    The built-in sum() adds in this way up to Python 3.11. Later versions correct the rounding errors, so the bits differ.
    """
    return functools.reduce(operator.add, values, 0.0)


def norm_of_squares(squares: Tensor) -> float:
    """Return the square root of the sum of squares, or 0 if the sum is negative. squares: (blocks,), float64. They are added in
    order. Independent.

    math.sqrt rounds its result correctly. The result of torch.sqrt can differ in the last bit, also for float64. This was seen
    with MKL on an AMD CPU.
    """
    return math.sqrt(squares.cpu().cumsum(0)[-1].clamp(min=0.0))


def global_norm(flat: Tensor) -> float:
    """Return the L2 norm of a flat gradient, computed in float64. flat: (n,), n a multiple of NORM_BLOCK.

    The blocks and their order are fixed, so the norm does not depend on the number of ranks or threads. Independent.
    """
    return norm_of_squares(squares_of_blocks(flat))

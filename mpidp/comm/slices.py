"""How a flat buffer is cut into slices, and the norm of a gradient by blocks."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGN = 64  # elements: every parameter and every slice begins at a multiple, so kernels see the same alignment everywhere

NORM_BLOCK = 1 << 12  # elements: the gradient norm is a sum over blocks of this size, in order


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def slice_bounds(length: int, size: int, multiple: int = ALIGN) -> list[int]:
    """Cut `length` elements into `size` slices at multiples of `multiple`: size + 1 bounds. Pure."""
    units = -(-length // multiple)
    return [min(length, r * units // size * multiple) for r in range(size)] + [length]


def squares_of_blocks(flat: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each block of NORM_BLOCK elements, float64 (blocks,); flat: (n,), n a multiple of NORM_BLOCK. The same
    bits for any number of threads, and whichever blocks are computed together. Independent."""
    rows = torch.linalg.vector_norm(flat.view(-1, 256), dim=1)  # many rows: torch splits a single long one over threads
    return rows.double().square().view(-1, NORM_BLOCK // 256).sum(1)


def global_norm(flat: Tensor) -> Tensor:
    """L2 norm of a flat gradient, float64 scalar. flat: (n,), n a multiple of NORM_BLOCK.

    Summed over fixed blocks in fixed order, so that neither the number of ranks nor of threads changes it. Independent.
    """
    return squares_of_blocks(flat).cpu().cumsum(0)[-1].sqrt()

"""Formulas for the bytes that a rank holds of a float32 model (docs/parallel.md). Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpidp.checkpoint.local_parameters import shard_rows
from mpidp.comm.slices import slice_bounds


def of_replicas(elements: int, slots: int, moments: int, rank: int = 0, slices: int = 1) -> dict[str, int]:
    """Return the bytes of levels 0 and 1 (slices: number of replicas). elements: of the flat layout; slots: gradient buffers;
    moments: 2 for adamw, 1 for sgd."""
    bounds = slice_bounds(elements, slices)
    mine = bounds[rank + 1] - bounds[rank]
    return {"parameters": 4 * elements, "gradients": 4 * elements * slots, "optimizer": 4 * mine * moments}


def of_shards(shapes: Sequence[Sequence[int]], rank: int, size: int, moments: int) -> dict[str, int]:
    """Return the bytes of levels 2 and 3 between steps, and with a step's gradients. FSDP2 pads parameters and gradients to an
    equal number of rows on each rank. During compute level 2 also holds all parameters; level 3 those of one or two blocks and
    those outside blocks."""
    row = [math.prod(shape[1:]) for shape in shapes]
    padded = sum(-(-shape[0] // size) * length for shape, length in zip(shapes, row, strict=True))
    mine = sum(len(shard_rows(shape[0], rank, size)) * length for shape, length in zip(shapes, row, strict=True))
    return {"parameters": 4 * padded, "gradients": 4 * padded, "optimizer": 4 * mine * moments}

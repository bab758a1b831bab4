"""Bytes that a rank holds of a model while it learns: counted, and by formula (docs/parallel.md). Float32. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from mpidp.comm.buckets import slice_bounds
from mpidp.held import shard_rows


def counted(**tensors: Iterable[Tensor]) -> dict[str, int]:
    """The memory under tensors, each once, by what it is for. Independent."""
    return {
        what: sum({s.data_ptr(): s.nbytes() for t in some if (s := t.untyped_storage()).nbytes()}.values())
        for what, some in tensors.items()
    }


def of_replicas(elements: int, slots: int, moments: int, rank: int = 0, slices: int = 1) -> dict[str, int]:
    """Levels 0 and 1 (slices: replicas). elements: of the flat layout; slots: gradient buffers; moments: 2 of adamw, 1 of sgd."""
    bounds = slice_bounds(elements, slices)
    mine = bounds[rank + 1] - bounds[rank]
    return {"parameters": 4 * elements, "gradients": 4 * elements * slots, "optimizer": 4 * mine * moments}


def of_shards(shapes: Sequence[Sequence[int]], rank: int, size: int, moments: int) -> dict[str, int]:
    """Levels 2 and 3, between steps and with a step's gradients: parameters and gradients as FSDP2 pads them, an equal number of
    rows a rank. While a rank computes level 2 also has all parameters, level 3 those of a block or two and of what is outside
    blocks."""
    row = [math.prod(shape[1:]) for shape in shapes]
    padded = sum(-(-shape[0] // size) * length for shape, length in zip(shapes, row, strict=True))
    mine = sum(len(shard_rows(shape[0], rank, size)) * length for shape, length in zip(shapes, row, strict=True))
    return {"parameters": 4 * padded, "gradients": 4 * padded, "optimizer": 4 * mine * moments}

"""Formulas for the bytes that a rank holds of a float32 model (docs/parallel.md). Pure."""

from __future__ import annotations

from collections.abc import Mapping

from mpidp.comm.slices import slice_bounds


def of_replicas(elements: int, slots: int, moments: int, rank: int = 0, slices: int = 1) -> dict[str, int]:
    """Return the bytes of levels 0 and 1 (slices: number of replicas). elements: of the flat layout; slots: gradient buffers;
    moments: 2 for adamw, 1 for sgd."""
    bounds = slice_bounds(elements, slices)
    mine = bounds[rank + 1] - bounds[rank]
    return {"parameters": 4 * elements, "gradients": 4 * elements * slots, "optimizer": 4 * mine * moments}


def of_shards(
    units: Mapping[str, int], rank: int, size: int, slots: int, moments: int, block: int, level: int
) -> dict[str, int]:
    """Return the bytes of levels 2 and 3 between steps; for the optimizer, the bytes with the padding of the layout, which are an
    upper bound. units: number of elements of each unit of the flat layout, with padding; slots: gradients that an owner stores;
    block: elements of a norm block. In a step, a rank also holds the gradient of about one unit, and at level 3 one whole
    Transformer block."""
    own = {name: (bounds := slice_bounds(length, size, block))[rank + 1] - bounds[rank] for name, length in units.items()}
    mine = sum(own.values())
    kept = sum(own[name] if level == 3 and name.startswith("blocks.") else length for name, length in units.items())
    return {"parameters": 4 * kept, "gradients": 4 * mine * slots, "optimizer": 4 * mine * moments}

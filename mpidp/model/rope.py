"""Rotary position embeddings (Su 2021), with the scalings of rope_scaling.py. R dimensions of a head are rotated. Dimension i
forms a pair with dimension i + R/2. Pure torch, no MPI."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpidp.model.rope_scaling import RopeScaling, rope_scaling
from mpidp.model.shape import TransformerShape


def rope_table(dims: int, length: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of the rotary angles, each (length, dims). In each row of cos, the second half is equal to the first. In
    each row of sin, the first half is the negative of the second.

    dims: number of rotated dimensions. length: number of positions. The scaling longrope chooses its factors by `length`.
    """
    frequency = theta ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    if scaling is not None:
        frequency = _scaled(frequency, theta, length, scaling)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    cos, sin = torch.cat([angle, angle], dim=-1).cos(), torch.cat([-angle, angle], dim=-1).sin()
    if scaling is not None and scaling.attention != 1.0:
        cos, sin = cos * scaling.attention, sin * scaling.attention
    return cos, sin


def _scaled(frequency: Tensor, theta: float, length: int, scaling: RopeScaling) -> Tensor:
    """Return the scaled frequencies. The variable `fast` is the fraction of each frequency that is kept. The rest is divided
    by the factor."""
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        return frequency / torch.tensor(scaling.long if length > scaling.original else scaling.short)
    if scaling.kind == "llama3":
        turns = scaling.original * frequency / (2 * math.pi)
        fast = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    else:
        fast = _yarn(2 * len(frequency), theta, scaling)
    return frequency * (fast + (1 - fast) / scaling.factor)


def _yarn(dims: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Return, for each pair of dimensions, the fraction of its frequency that is kept. The fraction falls linearly from 1 to 0
    with the index of the pair (Peng 2023, section 3.2)."""

    def pair(turns: float) -> float:
        """Return the index of the pair that makes `turns` full turns in the original context. The index may be a fraction."""
        return dims * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(scaling.high), pair(scaling.low)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    ramp = (torch.arange(dims // 2, dtype=torch.float32) - first) / ((last - first) or 0.001)
    return 1 - ramp.clamp(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with rotary positions applied to the first R dimensions. x: (B, H, T, E). cos, sin: (T, R) or (B, 1, T, R), 0 <=
    R <= E."""
    dims = cos.shape[-1]
    if dims == 0:
        return x
    turned, rest = (x, None) if dims == x.shape[-1] else (x[..., :dims], x[..., dims:])
    turned = turned * cos + turned.roll(dims // 2, dims=-1) * sin  # roll exchanges the halves
    return turned if rest is None else torch.cat([turned, rest.to(turned.dtype)], dim=-1)


def tables_of(shape: TransformerShape) -> dict[str, Tensor]:
    """Return the rotary tables of a model, by buffer name. The names are cos and sin. If layers with a window have their own
    theta, window_cos and window_sin are added.

    With learned positions, the tables have no columns.
    """
    dims = (shape.rotary_dims or shape.head_dim) if shape.positions == "rotary" else 0
    cos, sin = rope_table(dims, shape.seq_len, shape.rope_theta, rope_scaling(shape.rope_scaling))
    found = {"cos": cos, "sin": sin}
    if shape.window_rope_theta:
        scaling = rope_scaling(shape.window_rope_scaling)
        found["window_cos"], found["window_sin"] = rope_table(dims, shape.seq_len, shape.window_rope_theta, scaling)
    return found

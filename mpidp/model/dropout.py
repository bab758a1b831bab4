"""Dropout whose mask depends only on a key and the position, and not on the rank that computes it. Pure torch, no MPI."""

from __future__ import annotations

import torch
from torch import Tensor

SITE = 0x9E3779B9  # difference between the keys of successive sites; a site is one use of dropout in the model


def _hash32(x: Tensor) -> Tensor:
    """Return Wellons' hash lowbias32 of 32-bit integers, stored as int64. All devices give the same result."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def keyed_dropout(x: Tensor, p: float, key: Tensor | None, site: int, local: range | None = None, length: int = 0) -> Tensor:
    """Return x after dropout with probability `p`. The mask depends only on the key, the site and the index in x.

    x: any shape. key: int64 scalar tensor in [0, 2^32), or None for no dropout. site: the number of this use of dropout in the
    model. Different sites get different masks. local: the positions in x (B, len(local), D), if x has only some positions of a
    sequence. length: the number of positions of the whole sequence. The mask of x is the part of the whole sequence's mask at
    these positions.
    """
    if p == 0.0 or key is None:
        return x
    stream = _hash32((key + site * SITE) & 0xFFFFFFFF)
    places = torch.arange(x.numel(), device=x.device)
    if local is not None and len(local) != length:
        span = len(local) * x.shape[-1]  # elements of one sequence in x
        places += (places // max(1, span)) * (length * x.shape[-1] - span) + local.start * x.shape[-1]
    bits = _hash32((places + stream) & 0xFFFFFFFF)
    bits = _hash32(bits ^ _hash32(stream ^ 0x5BD1E995))  # without this line, one mask could be a shifted copy of another
    keep = bits >= round(p * 2**32)
    return x * keep.view(x.shape).to(x.dtype) * (1.0 / (1.0 - p))

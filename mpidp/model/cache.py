"""What a model remembers of one sequence, so that its next token costs one position and not all of them.

A model offers `new_cache(positions)`: a cache for that many, or None if it has none (then every token is computed from the whole
window); and takes `caches=[...]`, one a row of its input, each of which knows its `length`. Pure torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Cache:
    """Keys and values of the positions so far of one sequence, for the layers and heads of one part of a Transformer."""

    def __init__(self, capacity: int) -> None:
        """capacity: positions there is room for."""
        self.capacity, self.length = capacity, 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, (K, capacity, E) each

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (K, T, E) of the next T positions -> those of all positions so far. `length` grows once every layer has them."""
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"position {end - 1} of a cache for {self.capacity}")
        if layer not in self._kept:
            room = (k.shape[0], self.capacity, k.shape[2])
            self._kept[layer] = (k.new_empty(room), v.new_empty(room))
        for kept, new in zip(self._kept[layer], (k, v), strict=True):
            kept[:, self.length : end] = new
        keys, values = self._kept[layer]
        return keys[:, :end], values[:, :end]


def positions_of(caches: list[Cache], t: int, device: torch.device) -> Tensor:
    """(B, T): of the next t positions of each sequence."""
    begins = torch.tensor([cache.length for cache in caches], device=device)
    return begins.unsqueeze(1) + torch.arange(t, device=device)


def attend(caches: list[Cache], layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of T new positions over all so far: q (B, H, T, E), k and v (B, K, T, E) -> (B, H, T, E). Row by row:
    there is neither padding nor a mask, and nothing that a row's neighbours could change."""
    rows = [_attend_one(q[i], *cache.extend(layer, k[i], v[i])) for i, cache in enumerate(caches)]
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _attend_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (H, T, E); k, v (K, S, E) of all S positions, of which q's are the last T."""
    (h, t, e), (heads, s, _) = q.shape, k.shape
    if t == 1:  # the query heads of a group are as many queries to one key-value head
        return F.scaled_dot_product_attention(q.reshape(1, heads, h // heads, e), k[None], v[None]).view(h, 1, e)
    if heads < h:
        k, v = k.repeat_interleave(h // heads, dim=0), v.repeat_interleave(h // heads, dim=0)
    mask = None if s == t else torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None)[0]

"""The key-value cache of one sequence. With a cache, the model computes only one position for the next token, not the whole
window.

`model.new_cache(positions)` returns a cache for this many positions, or None if the model does not support caches. Without a
cache, each token is computed from the whole window. The argument `caches` of forward is a list with one cache per row of the
input. Pure torch.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from mpidp.model.scores import Scores, causal, masked, near

Kept: TypeAlias = dict[int, tuple[Tensor, Tensor]]


class Cache:
    """Keys and values of one sequence, for the layers and heads of one part of a Transformer."""

    def __init__(self, capacity: int) -> None:
        """capacity: largest number of positions."""
        self.capacity, self.length = capacity, 0
        self.kept: Kept = {}  # keys and values by layer, each (K, capacity, E)
        self.joint: Kept = {}  # the tensors of which `kept` has row `row`, each (B, K, capacity, E); see joint_cache.py
        self.row = 0  # of `joint`

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's keys and values (K, T, E) of the next T positions. Return the keys and values of all positions so far.

        `length` does not change here. The model increases it after the last layer. Raises ValueError if the cache is full.
        """
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"position {end - 1} exceeds the cache's capacity of {self.capacity} positions")
        if layer not in self.kept:
            room = (k.shape[0], self.capacity, k.shape[2])
            self.kept[layer] = (k.new_empty(room), v.new_empty(room))
        for kept, new in zip(self.kept[layer], (k, v), strict=True):
            kept[:, self.length : end] = new
        keys, values = self.kept[layer]
        return keys[:, :end], values[:, :end]


def positions_of(caches: list[Cache], t: int, device: torch.device) -> Tensor:
    """Return the next t positions of each sequence, shape (B, t)."""
    begins = torch.tensor([cache.length for cache in caches], device=device)
    return begins.unsqueeze(1) + torch.arange(t, device=device)


def attend(caches: list[Cache], layer: int, q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
    """Return causal attention of T new positions over all positions so far. q: (B, H, T, E); k, v: (B, K, T, E).

    The result is (B, H, T, E). Rows are computed one at a time, without padding, so a row's result does not depend on other rows.
    Joined caches are computed together.
    """
    if q.shape[2] == 1 and joined(caches):
        end, (keys, values) = caches[0].length + 1, caches[0].joint[layer]
        for i, cache in enumerate(caches):
            cache.extend(layer, k[i], v[i])
        return _attend_next(q, keys[:, :, :end], values[:, :, :end], how)
    rows = [_attend_one(q[i], *cache.extend(layer, k[i], v[i]), how) for i, cache in enumerate(caches)]
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
    """Return attention (H, T, E) of one sequence. q: (H, T, E) of the last T positions. k, v: (K, S, E) of all S positions."""
    (h, t, _), (heads, s, _) = q.shape, k.shape
    if t == 1:
        return _attend_next(q[None], k[None], v[None], how)[0]
    if heads < h:
        k, v = k.repeat_interleave(h // heads, dim=0), v.repeat_interleave(h // heads, dim=0)
    if s == t:
        return causal(q[None], k[None], v[None], how)[0]
    places = torch.arange(s, device=q.device)
    return masked(q[None], k[None], v[None], near(places[s - t :], places, how.window), how)[0]


def _attend_next(q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
    """Return attention (B, H, 1, E) of one new position of each sequence. q: (B, H, 1, E). k, v: (B, K, S, E).

    A group's query heads are treated as several queries to one key-value head.
    """
    (b, h, _, e), (_, heads, s, _) = q.shape, k.shape
    first = max(0, s - how.window) if how.window else 0
    k, v = k[:, :, first:], v[:, :, first:]
    return masked(q.reshape(b, heads, h // heads, e), k, v, None, how).view(b, h, 1, e)


def joined(caches: list[Cache]) -> bool:
    """Return whether the caches are all rows of the same tensors, in order, and have the same length. Pure."""
    first = caches[0]
    if not first.joint or len(caches) != len(next(iter(first.joint.values()))[0]):
        return False
    return all(c.joint is first.joint and c.row == i and c.length == first.length for i, c in enumerate(caches))

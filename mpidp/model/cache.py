"""The key-value cache of one sequence. With a cache, the model computes one position per generated token. Without a cache, it
computes all positions of the context again. Pure torch.

`model.new_cache(positions)` returns a cache for this many positions, or None if the model does not support caches. The
argument `caches` of forward is a list with one cache per sequence of the input.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from mpidp.model.scores import Scores, causal, masked, near

Kept: TypeAlias = dict[int, tuple[Tensor, Tensor]]
SLACK = 64  # extra positions in the memory of a layer with a window, so that most steps copy only the new position


class Cache:
    """Keys and values of one sequence, for the layers and heads of a Transformer that this rank has. A layer with a sliding
    window keeps only the positions that later positions can attend to."""

    def __init__(self, capacity: int) -> None:
        """capacity: maximum number of positions."""
        self.capacity, self.length = capacity, 0
        self.kept: Kept = {}  # layer -> (keys, values), each (K, room, E), with memory for `room` positions
        self.counts: dict[int, int] = {}  # layer -> number of kept positions
        self.joint: Kept = {}  # tensors (B, K, room, E) of several caches; `kept` has row `row` of them (joint_cache.py)
        self.row = 0  # this cache's row of `joint`

    def extend(self, layer: int, k: Tensor, v: Tensor, window: int = 0) -> tuple[Tensor, Tensor]:
        """Append the keys and values (K, T, E) of the next T positions of a layer. Return (keys, values) of all positions so
        far. With a sliding window, the result may lack positions to which none of these T positions attends.

        After the last layer, the caller must increase `length` by T. Raises ValueError if the cache is full.
        """
        t = k.shape[1]
        if self.length + t > self.capacity:
            raise ValueError(f"position {self.length + t - 1} exceeds the cache's capacity of {self.capacity} positions")
        if layer not in self.kept:
            room = (k.shape[0], min(self.capacity, window + SLACK) if window else self.capacity, k.shape[2])
            self.kept[layer], self.counts[layer] = (k.new_empty(room), v.new_empty(room)), 0
        pair, count = self.kept[layer], self.counts[layer]
        if count + t <= pair[0].shape[1]:
            for kept, new in zip(pair, (k, v), strict=True):
                kept[:, count : count + t] = new
            self.counts[layer] = count + t
            return pair[0][:, : count + t], pair[1][:, : count + t]
        first = max(0, count - window + 1)  # the first kept position to which the next position attends
        keys, values = (torch.cat([kept[:, first:count], new], 1) for kept, new in zip(pair, (k, v), strict=True))
        self.counts[layer] = count = min(window, keys.shape[1])
        for kept, whole in zip(pair, (keys, values), strict=True):
            kept[:, :count] = whole[:, -count:]
        return keys, values


def positions_of(caches: list[Cache], t: int, device: torch.device) -> Tensor:
    """Return the next `t` positions of each sequence, (B, t)."""
    begins = torch.tensor([cache.length for cache in caches], device=device)
    return begins.unsqueeze(1) + torch.arange(t, device=device)


def attend(caches: list[Cache], layer: int, q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
    """Return causal attention (B, H, T, E) of T new positions over all positions so far. q: (B, H, T, E). k, v: (B, K, T, E).
    how: the layer's sliding window, scale and soft-cap. The caches are extended by k and v.

    Sequences are computed one at a time, so the result of a sequence does not depend on the others. Only joined caches
    (joint_cache.py) are computed together.
    """
    if q.shape[2] == 1 and joined(caches):
        for i, cache in enumerate(caches):
            cache.extend(layer, k[i], v[i], how.window)
        end, (keys, values) = caches[0].counts[layer], caches[0].joint[layer]
        return _attend_next(q, keys[:, :, :end], values[:, :, :end], how)
    rows = [_attend_one(q[i], *cache.extend(layer, k[i], v[i], how.window), how) for i, cache in enumerate(caches)]
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
    """Return attention (H, T, E) of the last T positions of one sequence. q: (H, T, E). k, v: (K, S, E) of the last S
    positions."""
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
    """Return attention (B, H, 1, E) of one new position in each sequence. q: (B, H, 1, E). k, v: (B, K, S, E) of the last S
    positions."""
    (b, h, _, e), (_, heads, s, _) = q.shape, k.shape
    first = max(0, s - how.window) if how.window else 0
    k, v = k[:, :, first:], v[:, :, first:]
    return masked(q.reshape(b, heads, h // heads, e), k, v, None, how).view(b, h, 1, e)


def joined(caches: list[Cache]) -> bool:
    """Return whether the caches, in this order, are all rows of the same tensors, and have the same number of positions. Pure."""
    first = caches[0]
    if not first.joint or len(caches) != len(next(iter(first.joint.values()))[0]):
        return False
    places = first.length, first.counts
    return all(c.joint is first.joint and c.row == i and (c.length, c.counts) == places for i, c in enumerate(caches))

"""The key-value cache of one sequence. With a cache, the model computes only one position for the next token, not the whole
window.

`model.new_cache(positions)` returns a cache for this many positions, or None if the model does not support caches. Without a
cache, each token is computed from the whole window. The argument `caches` of forward is a list with one cache per row of the
input. Pure torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpidp.model.scores import Scores, causal, masked, near

SLACK = 64  # positions beyond the window for which a layer with a window has memory, so that most steps move nothing


class Cache:
    """Keys and values of one sequence, for the layers and heads of one part of a Transformer. Layers with a window keep only the
    positions that later positions attend to."""

    def __init__(self, capacity: int) -> None:
        """capacity: largest number of positions."""
        self.capacity, self.length = capacity, 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values by layer, each (K, room, E)
        self._counts: dict[int, int] = {}  # kept positions by layer

    def extend(self, layer: int, k: Tensor, v: Tensor, window: int = 0) -> tuple[Tensor, Tensor]:
        """Append a layer's keys and values (K, T, E) of the next T positions. Return the keys and values of all positions so far;
        with a window, at least of those to which the T positions attend.

        `length` does not change here. The model increases it after the last layer. Raises ValueError if the cache is full.
        """
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"position {end - 1} exceeds the cache's capacity of {self.capacity} positions")
        room = min(self.capacity, window + SLACK) if window else self.capacity
        if layer not in self._kept:
            self._kept[layer] = (k.new_empty(k.shape[0], room, k.shape[2]), v.new_empty(v.shape[0], room, v.shape[2]))
        count, pair = self._counts.get(layer, 0), self._kept[layer]
        if count + k.shape[1] <= room:
            for kept, new in zip(pair, (k, v), strict=True):
                kept[:, count : count + k.shape[1]] = new
            self._counts[layer] = count = count + k.shape[1]
            return pair[0][:, :count], pair[1][:, :count]
        first = max(0, count - window + 1)  # of the kept positions, the first to which the next one attends
        keys, values = (torch.cat([kept[:, first:count], new], 1) for kept, new in zip(pair, (k, v), strict=True))
        self._counts[layer] = count = min(window, keys.shape[1])
        for kept, whole in zip(pair, (keys, values), strict=True):
            kept[:, :count] = whole[:, -count:]
        return keys, values


def positions_of(caches: list[Cache], t: int, device: torch.device) -> Tensor:
    """Return the next t positions of each sequence, shape (B, t)."""
    begins = torch.tensor([cache.length for cache in caches], device=device)
    return begins.unsqueeze(1) + torch.arange(t, device=device)


def attend(caches: list[Cache], layer: int, q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
    """Return causal attention of T new positions over all positions so far. q: (B, H, T, E); k, v: (B, K, T, E).

    The result is (B, H, T, E). Rows are computed one at a time, without padding, so a row's result does not depend on other rows.
    """
    rows = [_attend_one(q[i], *cache.extend(layer, k[i], v[i], how.window), how) for i, cache in enumerate(caches)]
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
    """Return attention (H, T, E) of one sequence. q: (H, T, E) of the last T positions. k, v: (K, S, E) of the last S."""
    (h, t, e), (heads, s, _) = q.shape, k.shape
    if t == 1:  # treat a group's query heads as several queries to one key-value head
        first = max(0, s - how.window) if how.window else 0
        k, v = k[:, first:], v[:, first:]
        return masked(q.reshape(1, heads, h // heads, e), k[None], v[None], None, how).view(h, 1, e)
    if heads < h:
        k, v = k.repeat_interleave(h // heads, dim=0), v.repeat_interleave(h // heads, dim=0)
    if s == t:
        return causal(q[None], k[None], v[None], how)[0]
    places = torch.arange(s, device=q.device)
    return masked(q[None], k[None], v[None], near(places[s - t :], places, how.window), how)[0]

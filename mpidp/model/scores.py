"""Causal attention, softmax(scale Q K^T) V, with sliding windows and soft-caps. Pure torch, no MPI.

No T x T matrix is stored. With a window or a soft-cap, the queries are divided into blocks. With a window, a block reads only
the keys inside the windows of its queries. With a soft-cap, the scores of a block are computed again in backward. B: batch, H:
heads, T: positions, E: head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 128  # queries per block; the fastest of 64 to 1024 on CPUs (docs/results/2026-11-30-attention.md)


class Scores(NamedTuple):
    """The options of a layer that determine its attention scores."""

    window: int = 0  # a position attends to itself and the window - 1 positions before it; 0: to all positions before it
    scale: float | None = None  # q k^T is multiplied by this factor; None means E ** -0.5
    cap: float = 0.0  # scores become cap tanh(score / cap); 0: unchanged


def near(rows: Tensor, columns: Tensor, window: int) -> Tensor:
    """Return a bool mask (R, C). Entry (r, c) says whether query position rows[r] may attend to key position columns[c]. rows:
    (R,). columns: (C,). window: the size of the sliding window, or 0 for none."""
    allowed = columns <= rows.unsqueeze(-1)
    return allowed & (columns > rows.unsqueeze(-1) - window) if window else allowed


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to scores: 0 where `allowed` is True, and -inf elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: Scores) -> Tensor:
    """Return attention (B, H, R, E) of R queries over C keys and values. q: (B, H, R, E). k, v: (B, H, C, E).

    mask: (B or 1, 1, R, C), bool or additive. If it is None, all keys are allowed. how: the scale and the soft-cap. how.window
    is ignored.
    """
    if not how.cap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=how.scale)
    found: Tensor = _Capped.apply(q, k, v, mask, q.shape[-1] ** -0.5 if how.scale is None else how.scale, how.cap)  # type: ignore[no-untyped-call]
    return found


class _Capped(torch.autograd.Function):
    """Attention with a soft-cap. It saves only its inputs. backward() computes the scores again."""

    @staticmethod
    def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, cap: float) -> tuple[Tensor, Tensor]:
        """Return (tanh(scores / cap), attention weights), each (B, H, R, C) float32."""
        bent = (q @ k.transpose(-2, -1)).float().mul_(scale / cap).tanh_()
        scores = bent * cap
        if mask is not None:
            scores = scores.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else scores.add_(mask)
        return bent, torch.softmax(scores, dim=-1)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.cap = scale, cap
        return _Capped._weights(q, k, mask, scale, cap)[1].to(v.dtype) @ v

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (q, k, v, mask), grad = ctx.saved_tensors, grads[0]
        bent, weights = _Capped._weights(q, k, mask, ctx.scale, ctx.cap)
        of_v = weights.to(v.dtype).transpose(-2, -1) @ grad
        of_scores = (grad @ v.transpose(-2, -1)).float()  # gradient of the weights, later of the capped scores and of q k^T
        of_scores = of_scores.sub_((of_scores * weights).sum(-1, keepdim=True)).mul_(weights)
        of_scores = of_scores.mul_(bent.square_().neg_().add_(1)).mul_(ctx.scale).to(q.dtype)
        return of_scores @ k, of_scores.transpose(-2, -1) @ q, of_v, None, None, None


def causal(q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
    """Return causal attention (B, H, T, E) of successive positions. q, k, v: (B, H, T, E). how: the sliding window, the scale and
    the soft-cap."""
    t = q.shape[2]
    window = how.window if 0 < how.window < t else 0
    if not window and not how.cap:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=how.scale)
    begun = 0 if how.cap else window // ROWS * ROWS  # the first queries see all earlier positions without a mask
    first = [causal(q[:, :, :begun], k[:, :, :begun], v[:, :, :begun], how._replace(window=0))] if begun else []
    return torch.cat([*first, *_blocks(q, k, v, begun, window, how)], dim=2)


def _blocks(q: Tensor, k: Tensor, v: Tensor, begin: int, window: int, how: Scores) -> Iterator[Tensor]:
    """Yield the attention of each block of queries. The first block begins with the query at position `begin`. window: the size
    of the sliding window, or 0 for none."""
    t = q.shape[2]
    width = -(-window // 8) * 8 or t  # keys before a block's first query; GPU kernels need mask strides that are multiples of 8
    rows = torch.arange(min(ROWS, t), device=q.device)
    columns = torch.arange(-width, len(rows), device=q.device)  # relative to the block's first query, like the rows
    mask = additive(near(rows, columns, window), q.dtype)
    for a in range(begin, t, ROWS):
        b = min(a + ROWS, t)
        s = max(0, a - width)
        yield masked(q[:, :, a:b], k[:, :, s:b], v[:, :, s:b], mask[: b - a, width - (a - s) : width + b - a], how)

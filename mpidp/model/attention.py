"""Grouped-query attention (Ainslie 2023) with rotary positions and optional normalization of queries and keys. Pure
torch, no MPI.

B: batch, T: positions, D: model_dim, H: heads, K: key-value heads, E: head_dim (D / H by default).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mpidp.model.documents import Documents, within
from mpidp.model.feed_forward import OutputLinear
from mpidp.model.norms import Norm
from mpidp.model.part import Part
from mpidp.model.products import Linear
from mpidp.model.rope import rotate
from mpidp.model.scores import Scores, causal, masked
from mpidp.model.shape import TransformerShape

Past = Callable[[Tensor, Tensor, Tensor, Scores], Tensor]  # q, k, v of new positions -> attention over all positions so far
Mask = Tensor | Documents | None


class Attention(nn.Module):
    """Computes causal grouped-query attention, softmax(Q K^T / sqrt(E)) V with rotary Q and K. Options change the scale,
    normalize Q and K, or add a soft-cap. Block adds the bias of the output layer `o`."""

    def __init__(self, shape: TransformerShape, part: Part, layer: int = 0) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = len(part.own_range(shape.num_heads)), len(part.own_range(shape.num_kv_heads))
        self.head_dim, self.norm_heads = shape.head_dim, shape.qk_norm == "head"
        self.within = within  # compile_blocks() excludes this function from compilation
        self.scores = Scores(shape.window_of(layer), shape.attention_scale or None, shape.attention_cap)
        d, heads, kv, biased = shape.model_dim, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, shape.biased()
        self.q = Linear(d, heads, bias="q" in biased)
        self.k = Linear(d, kv, bias="k" in biased)
        self.v = Linear(d, kv, bias="v" in biased)
        self.o = OutputLinear(heads, d, bias="o" in biased)
        self.q_norm = self.k_norm = None
        if shape.qk_norm:
            self.q_norm = Norm(shape, self.head_dim if self.norm_heads else heads, "rms")
            self.k_norm = Norm(shape, self.head_dim if self.norm_heads else kv, "rms")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, past: Past | None = None) -> Tensor:
        """Return (B, T, D) for x (B, T, D). cos, sin: the rotary tables of the positions.

        mask: None for a causal mask, the packed documents, or a bool tensor (B, 1, T, T). In the tensor, True means that
        a query position may attend to a key position. past: a function that computes attention over the cached and the new
        positions, or None if there is no cache.
        """
        b, t, _ = x.shape
        q = self._heads(self.q(x), self.num_heads, self.q_norm)  # (B, H, T, E)
        k = self._heads(self.k(x), self.num_kv_heads, self.k_norm)  # (B, K, T, E)
        v = self._heads(self.v(x), self.num_kv_heads, None)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if past is not None:
            return self.o(past(q, k, v, self.scores).transpose(1, 2).reshape(b, t, -1))  # type: ignore[no-any-return]
        if self.num_kv_heads < self.num_heads:
            group = self.num_heads // self.num_kv_heads
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        if isinstance(mask, Documents):
            y = self.within(mask, q, k, v, self.scores)
        else:
            y = causal(q, k, v, self.scores) if mask is None else masked(q, k, v, mask, self.scores)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor, count: int, norm: nn.Module | None) -> Tensor:
        """Return x (B, T, count E) divided into heads, (B, count, T, E). If there is a norm, normalize the heads."""
        if norm is not None and not self.norm_heads:
            x = norm(x)
        heads = x.view(*x.shape[:2], count, self.head_dim)
        return (norm(heads) if norm is not None and self.norm_heads else heads).transpose(1, 2)

"""A decoder-only Transformer language model like LLaMA. Pure torch, no MPI.

RMSNorm (Zhang 2019), rotary positions in the half-split layout (Su 2021), SwiGLU (Shazeer 2020), grouped-query attention
(Ainslie 2023), pre-norm residual blocks, optionally tied embeddings. B: batch, T: positions, D: model_dim, H: heads,
K: key-value heads, E: head_dim (D / H by default), V: vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpidp.model.cache import Cache, attend, positions_of
from mpidp.model.part import Part, whole
from mpidp.model.rope_scaling import RopeScaling, rope_scaling
from mpidp.model.shape import TransformerShape, shapes_of

SITE = 0x9E3779B9  # difference between the dropout keys of two successive sites

Past = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q, k, v) of new positions -> their attention over cached and new positions


def _hash32(x: Tensor) -> Tensor:
    """Hash 32-bit integers with Wellons' lowbias32. The computation is in int64, so all devices give the same result."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def keyed_dropout(
    x: Tensor, p: float, key: Tensor | None, site: int, local: range | None = None, length: int = 0
) -> Tensor:
    """Apply dropout with a mask that is a pure function of (key, site, index in x), without a random generator.

    x: any shape. key: int64 scalar tensor in [0, 2^32), or None for no dropout. site: number of this dropout within the model.
    local: the positions of x (B, len(local), D) in a sequence of `length` positions. The mask equals the mask of the whole
    sequence at these positions.
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


def rope_table(head_dim: int, length: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles, each (length, head_dim). The second half of a row repeats the first."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is not None:  # `fast` is 0 for low frequencies and 1 for high frequencies
        turns = scaling.original * frequency / (2 * math.pi)
        fast = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
        frequency = frequency * (fast + (1 - fast) / scaling.factor)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions. x: (B, H, T, E); cos, sin: (T, E) or (B, 1, T, E)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class Attention(nn.Module):
    """Computes causal grouped-query attention: softmax(Q K^T / sqrt(E)) V with rotary Q and K."""

    def __init__(self, shape: TransformerShape, part: Part) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = len(part.own_range(shape.num_heads)), len(part.own_range(shape.num_kv_heads))
        self.head_dim = shape.head_dim
        self.q = nn.Linear(shape.model_dim, self.num_heads * self.head_dim, bias=False)
        self.k = nn.Linear(shape.model_dim, self.num_kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(shape.model_dim, self.num_kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(self.num_heads * self.head_dim, shape.model_dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: Past | None = None) -> Tensor:
        """Return (B, T, D) for x (B, T, D). mask: (B, 1, T, T) bool, or None for a causal mask. past: computes attention with a
        cache."""
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, E)
        k = self.k(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        v = self.v(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if past is not None:
            return self.o(past(q, k, v).transpose(1, 2).reshape(b, t, -1))
        if self.num_kv_heads < self.num_heads:
            group = self.num_heads // self.num_kv_heads
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class FeedForward(nn.Module):
    """Computes SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: TransformerShape, part: Part) -> None:
        super().__init__()
        hidden_dim = len(part.own_range(shape.hidden_dim))
        self.gate = nn.Linear(shape.model_dim, hidden_dim, bias=False)
        self.up = nn.Linear(shape.model_dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, shape.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, D) for x (B, T, D)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Computes x + attention(norm(x)), then x + feed_forward(norm(x)), with dropout on each branch's output."""

    def __init__(self, shape: TransformerShape, part: Part) -> None:
        super().__init__()
        self.dropout, self.part = shape.dropout, part
        self.attention_norm = nn.RMSNorm(shape.model_dim, eps=shape.norm_eps)
        self.attention = Attention(shape, part)
        self.feed_forward_norm = nn.RMSNorm(shape.model_dim, eps=shape.norm_eps)
        self.feed_forward = FeedForward(shape, part)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, key: Tensor | None, past: Past | None = None
    ) -> Tensor:
        """Return (B, T, D) for x (B, T, D). With sequence parallelism, x has only this rank's positions. cos and sin have all
        positions."""
        length = cos.shape[-2]
        local = self.part.positions(length)
        y = self.attention(self.attention_norm(x), cos, sin, mask, past)
        x = x + keyed_dropout(y, self.dropout, key, 1, local, length)
        y = self.feed_forward(self.feed_forward_norm(x))
        return x + keyed_dropout(y, self.dropout, key, 2, local, length)


class Transformer(nn.Module):
    """The Transformer language model. It maps tokens (B, T) to logits (B, T, V).

    A part of the model without the embedding takes hidden states (B, T, D). A part without the head returns hidden states (B, T,
    D).
    """

    def __init__(self, shape: TransformerShape, seed: int = 0, part: Part | None = None) -> None:
        """Initialize the parameters on the CPU, so a seed gives the same float32 values on every device and in every part."""
        super().__init__()
        self.shape, self.part = shape, part or whole(shape)
        self.recompute = False  # activation checkpointing: recompute each block in backward
        vocabulary = len(self.part.own_range(shape.vocab_size))
        self.embedding: nn.Module | None = None
        self.norm: nn.Module | None = None
        self.head: nn.Module | None = None
        if self.part.has_embedding:
            self.embedding = nn.Embedding(vocabulary, shape.model_dim)
        self.blocks = nn.ModuleDict({str(layer): Block(shape, self.part) for layer in self.part.layers})
        if self.part.has_head:
            self.norm = nn.RMSNorm(shape.model_dim, eps=shape.norm_eps)
            self.head = nn.Linear(shape.model_dim, vocabulary, bias=False)
            if shape.tie_embeddings and self.embedding is not None:
                self.head.weight = self.embedding.weight
        cos, sin = rope_table(shape.head_dim, shape.seq_len, shape.rope_theta, rope_scaling(shape.rope_scaling))
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if not next(self.parameters()).is_meta:
            self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Initialize matrices from a normal distribution with std 1/sqrt(D). For the last matrix of a residual branch, std is
        divided by sqrt(2 layers) (GPT-2). A part draws all tensors of the model, one at a time, and keeps its own boxes.
        """
        generator = torch.Generator().manual_seed(seed)
        local = {self.part.global_name(name): p for name, p in self.named_parameters()}
        for name, size in sorted(shapes_of(self.shape).items()):
            if len(size) == 2:
                std = 1.0 / math.sqrt(self.shape.model_dim)
                if name.endswith(("attention.o.weight", "feed_forward.down.weight")):
                    std /= math.sqrt(2 * self.shape.num_layers)
                p = local.get(name)
                drawn = p if p is not None and p.shape == size else torch.empty(size)
                nn.init.normal_(drawn, std=std, generator=generator)
                if p is not None and p is not drawn:
                    p.copy_(drawn[self.part.box(name, size)])

    def forward(
        self, x: Tensor, positions: Tensor | None = None, doc_ids: Tensor | None = None, key: Tensor | None = None,
        length: int = 0, chunk: int = 0, caches: list[Cache] | None = None,
    ) -> Tensor:
        """Return logits (B, T, V) of the next token.

        x: tokens (B, T) int64, T <= seq_len. positions: (B, T), default 0..T-1. doc_ids: (B, T); tokens attend only to tokens
        with equal ids. key: the dropout key, an int64 scalar tensor, or None for no dropout (evaluation). length: T, needed with
        sequence parallelism, where x has only this rank's positions. chunk: index into part.chunks. caches: one cache per row,
        with the positions before x. Afterwards the caches include x.
        """
        t = length or x.shape[1]
        if caches is not None:
            positions = positions_of(caches, t, x.device)
        if positions is None:
            cos, sin = self.cos[:t], self.sin[:t]
        else:
            cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)  # (B, 1, T, E)
        mask = None
        if doc_ids is not None:
            causal = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
            mask = (causal & (doc_ids.unsqueeze(1) == doc_ids.unsqueeze(2))).unsqueeze(1)  # (B, 1, T, T)
        if self.embedding is not None and chunk == 0:
            x = keyed_dropout(self.embedding(x), self.shape.dropout, key, 0, self.part.positions(t), t)
        for layer in self.part.chunks[chunk]:
            block = self.blocks[str(layer)]
            layer_key = None if key is None else key + 2 * layer * SITE  # computed here, so that all blocks compile to one graph
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, layer_key, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, mask, layer_key, None if caches is None else partial(attend, caches, layer))
        for cache in caches or ():
            cache.length += t
        ends = self.norm is not None and self.head is not None and chunk == len(self.part.chunks) - 1
        return self.head(self.norm(x)) if ends else x  # type: ignore[misc]

    def new_cache(self, positions: int) -> Cache | None:
        """Return an empty cache for a sequence of this many positions, at most seq_len."""
        return Cache(min(positions, self.shape.seq_len))

    def compile_blocks(self) -> None:
        """Compile each block with torch.compile. All layers share one graph; the head is not compiled."""
        for block in self.blocks.values():
            block.compile(dynamic=False)

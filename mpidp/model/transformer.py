"""A decoder-only Transformer language model. The default architecture is that of LLaMA. Pure torch, no MPI.

By default, the blocks have RMSNorm before each residual branch, rotary positions, SwiGLU, and grouped-query attention.
options.py lists the alternatives. B: batch, T: positions, D: model_dim, R: rotated dimensions of a head, V: vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpidp.model.attention import Mask
from mpidp.model.block import Block
from mpidp.model.cache import Cache, attend, positions_of
from mpidp.model.documents import DENSE, Documents, dense_mask
from mpidp.model.dropout import SITE, keyed_dropout
from mpidp.model.lora import weight_of
from mpidp.model.norms import Norm
from mpidp.model.part import Part, whole
from mpidp.model.products import Linear, linear
from mpidp.model.rope import tables_of
from mpidp.model.shape import TransformerShape, shapes_of

COMPILED_SHAPES = 128  # number of batch shapes that compile_blocks() compiles


class Transformer(nn.Module):
    """The Transformer language model. It maps tokens (B, T) to logits (B, T, V).

    A pipeline stage without the embedding takes hidden states (B, T, D). A stage without the head returns hidden states (B, T,
    D).
    """

    def __init__(self, shape: TransformerShape, seed: int = 0, part: Part | None = None) -> None:
        """Initialize the parameters on the CPU. A seed gives the same float32 values on every device and for every division of
        the model among ranks."""
        super().__init__()
        self.shape, self.part = shape, part or whole(shape)
        self.defers_head = False  # True: return hidden states instead of logits
        self.recompute = False  # True: activation checkpointing, which recomputes each block in backward
        vocabulary = len(self.part.own_range(shape.vocab_size))
        self.embedding: nn.Module | None = None
        self.positions: nn.Module | None = None  # the table of learned positions
        self.norm: nn.Module | None = None
        self.head: nn.Module | None = None
        if self.part.has_embedding:
            self.embedding = nn.Embedding(vocabulary, shape.model_dim)
            self.positions = nn.Embedding(shape.table_rows, shape.model_dim) if shape.table_rows else None
        self.blocks = nn.ModuleDict({str(layer): Block(shape, self.part, layer) for layer in self.part.layers})
        if self.part.has_head:
            self.norm = Norm(shape, shape.model_dim)
            self.head = Linear(shape.model_dim, vocabulary, bias=False)
            if shape.tie_embeddings and self.embedding is not None:
                self.head.weight = self.embedding.weight
        for name, table in tables_of(shape).items():
            self.register_buffer(name, table, persistent=False)
        if not next(self.parameters()).is_meta:
            self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Initialize matrices from a normal distribution with std 1/sqrt(D). For the last matrix of a residual branch, divide
        std by sqrt(2 num_layers) (GPT-2). Set biases to 0. If the model is split over ranks, each rank draws all matrices of the
        whole model, one at a time, and keeps only its own block of each matrix."""
        generator = torch.Generator().manual_seed(seed)
        local = {self.part.global_name(name): p for name, p in self.named_parameters()}
        for name, bias in local.items():
            if name.endswith(".bias"):
                bias.zero_()
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

        x: tokens (B, T) int64, T <= seq_len. positions: the position of each token, (B, T). If it is None, the positions are 0
        to T - 1. doc_ids: the number of each token's document, (B, T). Tokens attend only to tokens of the same document. key:
        the dropout key, an int64 scalar tensor, or None for no dropout (evaluation). length: T. If it is 0, T is the number of
        positions in x. With sequence parallelism, `length` is required if x has only this rank's positions. chunk: index into
        part.chunks, which are groups of consecutive layers. caches: one cache per sequence, with the keys and values of the
        positions before x. The positions of x are added to the caches.
        """
        t = length or x.shape[1]
        if caches is not None:
            positions = positions_of(caches, t, x.device)
        if self.embedding is not None and chunk == 0:
            x = keyed_dropout(self._embedded(x, positions, t), self.shape.dropout, key, 0, self.part.positions(t), t)
        x0 = x if self.shape.input_mix else None
        tables, masks = self._rotary_tables(positions, t), self._masks(doc_ids)
        for layer in self.part.chunks[chunk]:
            block, window = self.blocks[str(layer)], self.shape.window_of(layer)
            layer_key = None if key is None else key + 2 * layer * SITE  # computed here, so that all blocks compile to one graph
            cos, sin = tables[self._table_of(layer)]
            if self.recompute and torch.is_grad_enabled():
                given = (x, cos, sin, masks.get(window), layer_key, None, x0)
                x = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                past = None if caches is None else partial(attend, caches, layer)
                x = block(x, cos, sin, masks.get(window), layer_key, past, x0)
        for cache in caches or ():
            cache.length += t
        ends = self.norm is not None and self.head is not None and chunk == len(self.part.chunks) - 1
        if not ends:
            return x
        x = self.head(self.norm(x))  # type: ignore[misc]
        return x if self.defers_head else self._capped(x)

    def _embedded(self, tokens: Tensor, positions: Tensor | None, t: int) -> Tensor:
        """Return the embeddings (B, T, D) of tokens (B, T), plus learned positions. With sequence parallelism, return only the
        embeddings of this rank's positions."""
        x: Tensor = self.embedding(tokens)  # type: ignore[misc]
        if self.shape.embedding_scale != 1.0:
            x = x * self.shape.embedding_scale
        if self.positions is not None:
            places, own = torch.arange(t, device=x.device) if positions is None else positions, self.part.positions(t)
            x = x + self.positions(places[..., own.start : own.stop])
        return x

    def _table_of(self, layer: int) -> str | None:
        """Return the prefix of the names of a layer's rotary tables: "" or "window_". If the layer has no rotary positions,
        return None."""
        if not self.shape.is_rotary(layer):
            return None
        return "window_" if self.shape.window_of(layer) and self.shape.window_rope_theta else ""

    def _rotary_tables(self, positions: Tensor | None, t: int) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Return {result of _table_of(): (cos, sin) of the positions}. cos and sin are (T, R) or (B, 1, T, R). For the key None,
        R is 0."""
        found: dict[str | None, tuple[Tensor, Tensor]] = {}
        for prefix in {self._table_of(layer) for layer in self.part.layers}:
            tables = (getattr(self, f"{prefix or ''}{part}") for part in ("cos", "sin"))
            cos, sin = (one[:t] if positions is None else one[positions].unsqueeze(1) for one in tables)
            found[prefix] = (cos[..., :0], sin[..., :0]) if prefix is None else (cos, sin)
        return found

    def _masks(self, doc_ids: Tensor | None) -> dict[int, Mask]:
        """Return {window: mask of the packed documents} for each sliding window that a layer has. Without documents,
        return {}."""
        if doc_ids is None:
            return {}
        windows = {self.shape.window_of(layer) for layer in self.part.layers}
        if doc_ids.shape[1] <= DENSE:
            return {window: dense_mask(doc_ids, window) for window in windows}
        return dict.fromkeys(windows, Documents(doc_ids))

    def _capped(self, logits: Tensor) -> Tensor:
        """Return the logits after the multiplication by logit_scale and the soft-cap."""
        cap, scale = self.shape.logit_cap, self.shape.logit_scale
        logits = logits if scale == 1.0 else logits * scale
        return cap * torch.tanh(logits / cap) if cap else logits

    def defer_head(self) -> None:
        """Make forward() return hidden states (B, T, D) after the last norm instead of logits. The loss must then apply the
        head. A second call changes nothing, so that a change that share_layers() has made to the head is kept. Independent."""
        if self.head is not None and not self.defers_head:
            self.head.forward = _unchanged  # type: ignore[method-assign]
            self.head._forward_hooks.clear()  # the loss applies the adapter of the head, too (lora.weight_of)
        self.defers_head = True

    def deferred_logits(self, hidden: Tensor) -> Tensor:
        """Return logits (B, T, V) for the hidden states (B, T, D) that forward() returns after defer_head(). Pure."""
        return self._capped(linear(hidden, weight_of(self.head)))

    def new_cache(self, positions: int) -> Cache | None:
        """Return an empty cache with memory for `positions` positions, but at most seq_len."""
        return Cache(min(positions, self.shape.seq_len))

    def compile_blocks(self) -> None:
        """Compile each block with torch.compile. The head, and attention within long packed sequences, are not compiled.

        torch.compile stops compiling after recompile_limit shapes of a batch, and the bits then change. A rank may reach this
        limit before the others. Therefore, the limit is raised to COMPILED_SHAPES.
        """
        torch._dynamo.config.recompile_limit = max(COMPILED_SHAPES, torch._dynamo.config.recompile_limit)
        for block in self.blocks.values():
            attention: Any = block.attention
            attention.within = torch.compiler.disable(attention.within)
            block.compile(dynamic=False)


def _unchanged(x: Tensor) -> Tensor:
    return x

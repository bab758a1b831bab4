"""Layers whose bits do not depend on the tensor-parallel size (model.slices).

A model of S slices divides each layer as S tensor-parallel ranks would (tensor.py): a slice has some heads, hidden channels and
rows of the vocabulary. One rank of T computes S / T slices, one after the other. Each matrix product, attention and activation
has the shape of one slice, and its operands are contiguous and aligned, so a library computes the same bits on every mesh. What
is summed over slices is added in the order of a fixed tree (tree_comm.py): the outputs of o and down, the gradients of the inputs
of q, k, v, gate, up and the head, the gradients of norms of single heads, and the sums of exponentials of the loss.

Everything between branches is computed from the sums, alike on all ranks. With one rank, the same code computes all slices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _functional_call

from mpidp.model.attention import Attention
from mpidp.model.feed_forward import FeedForward
from mpidp.model.shape import shapes_of
from mpidp.parallel.chunked_loss import defer_head
from mpidp.parallel.tensor import VocabEmbedding
from mpidp.parallel.tree_comm import TreeComm, tree_sum

ALIGNMENT = {"cpu": 64, "cuda": 256}  # bytes; torch allocates new tensors with at least this alignment


def aligned(x: Tensor) -> Tensor:
    """Return x, or a copy of x that is contiguous and aligned, as a new tensor is. Pure."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT.get(x.device.type, 1) == 0 else x.clone()


def pieces(p: Tensor, cut: tuple[int, list[int]]) -> list[Tensor]:
    """Return the slices of this rank's part of a parameter. cut: (dimension, lengths), as from Part.slices(). Pure."""
    return [aligned(piece) for piece in p.split(cut[1], cut[0])]


class _Copies(torch.autograd.Function):
    """Returns one copy of a tensor for each slice. Backward adds the gradients of the copies, over the slices of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, tp: TreeComm) -> tuple[Tensor, ...]:
        ctx.tp = tp
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _sum(grads, ctx.tp), None, None


class _Joined(torch.autograd.Function):
    """Returns the sum of the partial results of all slices. Every slice has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, tp: TreeComm, *parts: Tensor) -> Tensor:
        ctx.count = len(parts)
        return _sum(parts, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *(grads[0] for _ in range(ctx.count))


def _copies(x: Tensor, count: int, tp: TreeComm) -> Sequence[Tensor]:
    found: Sequence[Tensor] = _Copies.apply(x, count, tp)  # type: ignore[no-untyped-call]
    return found


def _sum(parts: Sequence[Tensor], tp: TreeComm) -> Tensor:
    """Return the sum of the parts of all ranks' slices, rounded once to their dtype. Collective over tp.comm."""
    return tp.sum(tree_sum([part.float() for part in parts])).to(parts[0].dtype)


class SlicedBranch:
    """The forward function of the attention or the feed-forward layer of a block, computed slice by slice."""

    def __init__(
        self, branch: nn.Module, template: nn.Module, cuts: Mapping[str, tuple[int, list[int]] | None], count: int, tp: TreeComm
    ) -> None:
        """template: the module of one slice, whose parameters are not used. cuts: how each parameter is cut (Part.slices()).
        count: number of slices of this rank."""
        for p in template.parameters():
            p.data = torch.empty(0)
        self._branch, self._template, self._cuts, self._count, self._tp = branch, template, cuts, count, tp

    def _slices_of(self, p: Tensor, cut: tuple[int, list[int]] | None) -> Sequence[Tensor]:
        return _copies(p, self._count, self._tp) if cut is None else pieces(p, cut)

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        """Return the output of the branch, (B, T, D), for x (B, T, D). Collective over tp.comm, also in backward."""
        inputs, held = _copies(x, self._count, self._tp), dict(self._branch.named_parameters())
        slices = {name: self._slices_of(held[name], cut) for name, cut in self._cuts.items()}
        parts = [
            _functional_call(self._template, {name: of[s] for name, of in slices.items()}, (inputs[s], *args))
            for s in range(self._count)
        ]
        joined: Tensor = _Joined.apply(self._tp, *parts)  # type: ignore[no-untyped-call]
        return joined


def slice_layers(model: Any, slices: int, tp: TreeComm) -> None:
    """Change a part of a Transformer so that it computes every layer slice by slice, together with the other ranks of its stage.
    Independent."""
    shape, part, count, sizes = model.shape, model.part, slices // tp.comm.size, shapes_of(model.shape)
    one = replace(part, index=0, size=slices)
    for layer, block in model.blocks.items():
        for name, template in (("attention", Attention(shape, one, int(layer))), ("feed_forward", FeedForward(shape, one))):
            branch, prefix = getattr(block, name), f"blocks.{layer}.{name}."
            inside = [key for key, _ in branch.named_parameters() if key not in ("o.bias", "down.bias")]  # added after the sum
            cuts = {key: part.slices(prefix + key, sizes[prefix + key], slices) for key in inside}
            branch.forward = SlicedBranch(branch, template, cuts, count, tp)
    if model.embedding is not None:
        model.embedding = VocabEmbedding(model.embedding, part.own_range(shape.vocab_size).start, tp)


def sliced_loss(model: Any, slices: int, rows: int, dtype: torch.dtype, tp: TreeComm) -> Callable[[Tensor, Tensor], Tensor]:
    """Change a part of a Transformer so that it returns hidden states; return the function that computes its loss from them,
    `rows` positions at a time. The gradient of the hidden states is added over all slices in forward, before backward multiplies
    it, because a factor changes the rounding of sums. Independent."""
    first = model.part.own_range(model.shape.vocab_size).start
    return defer_head(model, model.shape, rows, dtype, first, tp, partial(_head_slices, model, slices), partial(_sum, tp=tp))


def _head_slices(model: Any, slices: int) -> list[Tensor]:
    weight, cut = model.head.weight, model.part.slices("head.weight", (model.shape.vocab_size, model.shape.model_dim), slices)
    return pieces(weight, cut)

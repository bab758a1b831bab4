"""Layers whose results have the same bits for every tensor-parallel size (model.slices).

A model of S slices divides each layer as S tensor-parallel ranks would (tensor.py). A slice has some of the layer's heads,
hidden channels or rows of the vocabulary. With T ranks, each rank computes S / T slices, one after the other. Each matrix
product, attention and activation has the shape of one slice, and its operands are contiguous and aligned. Math libraries
therefore compute the same bits on every mesh. Sums over slices are added in the order of a fixed tree (tree_comm.py). These sums
are the outputs of `o` (attention) and `down` (feed-forward), the gradients of the inputs of `q`, `k`, `v`, `gate`, `up` and the
head, the gradients of the norms of single heads, the gradients of those factors of adapters that are not divided (lora.py),
and the sums of exponentials in the loss.

Between these layers, every rank of a stage computes the same values. With sequence parallelism, each rank computes only the
values of its own positions (sliced_positions.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _functional_call

from mpidp.model.attention import Attention
from mpidp.model.feed_forward import FeedForward
from mpidp.model.lora import attach_like
from mpidp.parallel.chunked_loss import defer_head
from mpidp.parallel.sliced_positions import Copies, PositionRanges, slice_bias, slice_mix, slice_norm, slice_table
from mpidp.parallel.tensor import Regather, VocabEmbedding
from mpidp.parallel.tensor_comm import SumInForward
from mpidp.parallel.tree_comm import TreeComm, aligned, tree_sum


def pieces(p: Tensor, cut: tuple[int, list[int]]) -> list[Tensor]:
    """Return the slices of `p`, this rank's part of a parameter. cut: (dimension, length of each slice), from Part.slices().
    Pure."""
    return [aligned(piece) for piece in p.split(cut[1], cut[0])]


class _Joined(torch.autograd.Function):
    """Returns the sum of the partial results over the slices of all ranks. With sequence parallelism, returns only this rank's
    positions of the sum. In backward, every slice gets the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, tp: TreeComm, *parts: Tensor) -> Tensor:
        ctx.tp, ctx.count, ctx.length = tp, len(parts), parts[0].shape[1]
        return _sum(parts, tp, tp.sequence)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = ctx.tp.gather(grads[0], ctx.length) if ctx.tp.sequence else grads[0]
        return None, *(grad for _ in range(ctx.count))


class _Gathered(torch.autograd.Function):
    """Gathers `x`, and returns the positions of all ranks. Backward returns the gradient of this rank's positions. Backward
    does not add gradients over ranks, because sliced_loss() has already done so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: range, tp: TreeComm) -> Tensor:
        ctx.own = own
        return tp.gather(x, tp.length)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0][:, ctx.own.start : ctx.own.stop].contiguous(), None, None


def _sum(parts: Sequence[Tensor], tp: TreeComm, scatters: bool = False) -> Tensor:
    """Add one tensor per slice, over the slices of all ranks, and return the sum. parts: the tensors of this rank's slices. If
    `scatters`, return only this rank's positions of the sum. The sum is computed in float32 and then rounded to the dtype of
    the parts. Collective over tp.comm."""
    total = tree_sum([part.float() for part in parts])
    if tp.comm.size > 1:
        total = tp.scatter(total) if scatters else tp.sum(total)
    return total.to(parts[0].dtype)


class SlicedBranch:
    """Computes the attention or the feed-forward layer of a block slice by slice. An instance replaces the layer's forward()."""

    def __init__(
        self, branch: nn.Module, template: nn.Module, cuts: Mapping[str, tuple[int, list[int]] | None], count: int, tp: TreeComm,
        regathers: bool,
    ) -> None:
        """template: a module with the sizes of one slice. Its parameters are not used. cuts: the result of Part.slices() for each
        parameter. count: number of slices of this rank. regathers: whether backward gathers the positions of the input again
        (Regather). Independent."""
        attach_like(template, branch)
        for p in template.parameters():
            p.data = torch.empty(0)
        self._branch, self._template, self._cuts, self._count, self._tp = branch, template, cuts, count, tp
        self._regathers, self._slices_in_all = regathers, count * tp.comm.size

    def _slices_of(self, p: Tensor, cut: tuple[int, list[int]] | None) -> Sequence[Tensor]:
        add = partial(_sum, tp=self._tp)
        return Copies.apply(aligned(p), self._count, add) if cut is None else pieces(p, cut)  # type: ignore[no-any-return, no-untyped-call]

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        """Return the output (B, T, D) of the layer for `x`, (B, T, D). With sequence parallelism, `x` and the output have only
        this rank's positions. args: the layer's other arguments. Collective over tp.comm, also in backward."""
        tp, count = self._tp, self._count
        gather = partial(tp.gather, length=tp.length) if tp.sequence else None
        inputs = Copies.apply(x, count, partial(_sum, tp=tp, scatters=tp.sequence), gather)  # type: ignore[no-untyped-call]
        hooks: AbstractContextManager[Any] = nullcontext()
        if self._regathers:
            regather = Regather(x, inputs[0], tp)
            hooks = torch.autograd.graph.saved_tensors_hooks(regather.pack, regather.unpack)
        held = dict(self._branch.named_parameters())
        slices = {name: self._slices_of(held[name], cut) for name, cut in self._cuts.items()}
        with hooks:
            parts = self._compute(slices, inputs, args)
        joined: Tensor = _Joined.apply(tp, *parts)  # type: ignore[no-untyped-call]
        return joined

    def _compute(self, slices: Mapping[str, Sequence[Tensor]], inputs: Sequence[Tensor], args: tuple[Any, ...]) -> list[Tensor]:
        """Return the partial result of each slice. slices: the slices of each parameter, by name. inputs: a copy of the input for
        each slice. args: the layer's other arguments."""
        return [self._of_slice(s, slices, inputs, args) for s in range(self._count)]

    def _of_slice(
        self, s: int, slices: Mapping[str, Sequence[Tensor]], inputs: Sequence[Tensor], args: tuple[Any, ...]
    ) -> Tensor:
        found: Tensor = _functional_call(self._template, {name: of[s] for name, of in slices.items()}, (inputs[s], *args))
        return found


class SlicedNormAttention(SlicedBranch):
    """Attention whose queries and keys are normalized over all heads together (model.qk_norm=layer). The sums of squares of all
    slices are added before any slice is normalized."""

    def __init__(self, branch: nn.Module, template: Any, *args: Any) -> None:
        super().__init__(branch, template, *args)
        self._layers = {name: getattr(template, name) for name in ("q", "k")}
        template.q, template.k = _Given(), _Given()

    def _compute(self, slices: Mapping[str, Sequence[Tensor]], inputs: Sequence[Tensor], args: tuple[Any, ...]) -> list[Tensor]:
        known = {name: self._projected(name, slices, inputs) for name in self._layers}
        parts = []
        for s in range(self._count):
            for name, (projected, totals) in known.items():
                layer, norm = getattr(self._template, name), getattr(self._template, f"{name}_norm")
                width = self._slices_in_all * projected[s].shape[-1]
                layer.found = projected[s]
                norm.forward = partial(_normalized, norm, totals[s], width)
            parts.append(self._of_slice(s, slices, inputs, args))
        return parts

    def _projected(
        self, name: str, slices: Mapping[str, Sequence[Tensor]], inputs: Sequence[Tensor]
    ) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Return (queries or keys, sums of squares). Both are sequences with one tensor per slice of this rank. name: "q" for
        queries, "k" for keys. Each sum of squares is a copy of the sum over the slices of all ranks."""
        held = {key.partition(".")[2]: of for key, of in slices.items() if key.partition(".")[0] == name}
        found: list[Tensor] = [
            _functional_call(self._layers[name], {key: of[s] for key, of in held.items()}, (x,)) for s, x in enumerate(inputs)
        ]
        squares = [one.float().square().sum(-1, keepdim=True) for one in found]
        total = SumInForward.apply(tree_sum(squares), self._tp)  # type: ignore[no-untyped-call]
        return found, Copies.apply(total, self._count, partial(_sum, tp=self._tp))  # type: ignore[no-untyped-call]


class _Given(nn.Module):
    """A layer whose output was already computed."""

    found: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.found


def _normalized(norm: Any, total: Tensor, width: int, x: Tensor) -> Tensor:
    """Return x * gain / rms, where rms is the root mean square over the heads of all slices. total: the sum of squares over
    these heads. width: the number of channels of these heads."""
    return x.to(norm.weight.dtype) * torch.rsqrt(total / width + norm.eps) * norm.gain(norm.weight)  # type: ignore[no-any-return]


def slice_layers(model: Any, slices: int, tp: TreeComm, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Change `model`, a part of a Transformer, so that it computes its layers slice by slice. All ranks of a stage compute a
    layer together. slices: model.slices. sizes: the shapes of the whole model's parameters. Independent."""
    shape, part, count = model.shape, model.part, slices // tp.comm.size
    one, ranges = replace(part, index=0, size=slices), PositionRanges(slices, tp)

    def enter(model: nn.Module, args: tuple[Any, ...]) -> None:
        tp.length = (args[4] if len(args) > 4 else 0) or args[0].shape[1]

    model.register_forward_pre_hook(enter)
    for layer, block in model.blocks.items():
        for name, template in (("attention", Attention(shape, one, int(layer))), ("feed_forward", FeedForward(shape, one))):
            branch, prefix = getattr(block, name), f"blocks.{layer}.{name}."
            inside = [key for key, _ in branch.named_parameters() if key not in ("o.bias", "down.bias")]  # added after the sum
            cuts = {key: part.slices(prefix + key, sizes[prefix + key], slices) for key in inside}
            over_heads = name == "attention" and shape.qk_norm == "layer"
            kind = SlicedNormAttention if over_heads else SlicedBranch
            branch.forward = kind(branch, template, cuts, count, tp, tp.sequence and not model.recompute)
        for norm in block.children():
            slice_norm(norm, ranges)
        slice_bias(block.attention.o, ranges)
        slice_bias(block.feed_forward.down, ranges)
        if block.input_mix is not None:
            slice_mix(block.input_mix, ranges)
    if model.embedding is not None:
        model.embedding = VocabEmbedding(model.embedding, part.own_range(shape.vocab_size).start, tp)
    if model.positions is not None:
        slice_table(model.positions, ranges)
    if model.head is not None:
        slice_norm(model.norm, ranges)
        if tp.sequence:
            model.head.forward = lambda x: _Gathered.apply(x, part.positions(tp.length), tp)


def sliced_loss(model: Any, slices: int, rows: int, dtype: torch.dtype, tp: TreeComm) -> Callable[[Tensor, Tensor], Tensor]:
    """Change `model`, a part of a Transformer, so that it returns hidden states instead of logits. Return a function (hidden
    states, targets) that computes the sum of the token losses, `rows` positions at a time. In forward, this function also
    computes the gradients of the hidden states and adds them over all slices. dtype: dtype of matrix products. Independent."""
    first = model.part.own_range(model.shape.vocab_size).start
    weights, add = partial(_head_slices, model, slices), partial(_sum, tp=tp)
    return defer_head(model, model.shape, rows, dtype, first, tp, weights, add)


def _head_slices(model: Any, slices: int) -> list[Tensor]:
    weight, cut = model.head.weight, model.part.slices("head.weight", (model.shape.vocab_size, model.shape.model_dim), slices)
    return pieces(weight, cut)

"""Sums the gradients of parameters that act on every position, in a model that is divided into slices (model.slices). These
parameters are the gains and biases of norms, the biases of the linear layers `o` (attention) and `down` (feed-forward), the
learned positions, and the factors of `InputMix` layers.

The gradients of these parameters are sums over positions. The positions of a sequence are cut into as many ranges as the model
has slices. A gradient is summed within each range. Then the sums of the ranges are added in the order of the tree (tree_comm.py).
With sequence parallelism, a rank has only the positions of its own ranges. Otherwise every rank has all positions. Both cases add
the same numbers in the same order. Therefore the bits of the gradients do not depend on mesh.sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpidp.model.norms import Norm
from mpidp.parallel.tree_comm import TreeComm, aligned, tree_sum


class PositionRanges:
    """Cuts tensors into this rank's ranges of positions, and sums over the ranges of all ranks."""

    def __init__(self, slices: int, tp: TreeComm) -> None:
        self._slices, self._tp = slices, tp
        self.count = slices // tp.comm.size if tp.sequence else slices  # number of ranges of this rank

    def cut(self, x: Tensor, dim: int = 1) -> Sequence[Tensor]:
        """Split `x` along dimension `dim` into this rank's ranges of positions. Return one view of `x` per range, in order. In
        this dimension, `x` has the positions of all ranges of this rank, and no others. Independent."""
        length, first = (self._tp.length, self._tp.comm.rank * self.count) if self._tp.sequence else (x.shape[dim], 0)
        bounds = [i * length // self._slices for i in range(first, first + self.count + 1)]
        return x.split([b - a for a, b in zip(bounds, bounds[1:], strict=False)], dim)

    def add(self, parts: Sequence[Tensor]) -> Tensor:
        """Add one tensor per range of positions, over all ranges of the sequence, and return the sum. parts: one tensor for each
        range of this rank. Collective over tp.comm with sequence parallelism, else independent."""
        total = tree_sum(parts)
        return self._tp.sum(total) if self._tp.sequence else total


class _Spread(torch.autograd.Function):
    """Repeats a tensor for every position. Backward sums the gradient over the positions, range by range."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, x: Tensor, ranges: PositionRanges) -> Tensor:
        ctx.ranges, ctx.shape = ranges, p.shape
        return p.expand(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        parts = [aligned(part).reshape(-1, *ctx.shape).sum(0) for part in ctx.ranges.cut(grads[0])]
        return ctx.ranges.add(parts), None, None


class Copies(torch.autograd.Function):
    """Returns `count` copies of a tensor. Backward adds the gradients of the copies with the function `add`. gather: a function
    that is applied to the tensor before the copies are made. Backward skips it, so `add` must return the gradient of the tensor
    before `gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, add: Callable[..., Tensor], gather: Any = None) -> tuple[Tensor, ...]:
        ctx.add = add
        whole = x if gather is None else gather(x)
        return tuple(whole.view_as(whole) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.add(grads), None, None, None


def slice_norm(norm: Any, ranges: PositionRanges) -> None:
    """Change a norm so that the gradients of its gain and bias are summed range by range. Independent."""
    if not isinstance(norm, Norm):  # an Identity
        return

    def forward(x: Tensor) -> Tensor:
        weight, bias, x = norm.weight, norm.bias, x.to(norm.weight.dtype)
        plain = F.rms_norm(x, weight.shape, None, norm.eps) if bias is None else F.layer_norm(x, weight.shape, eps=norm.eps)
        y: Tensor = plain * _Spread.apply(norm.gain(weight), x, ranges)  # type: ignore[no-untyped-call]
        return y if bias is None else y + _Spread.apply(bias, x, ranges)  # type: ignore[no-any-return, no-untyped-call]

    norm.forward = forward  # type: ignore[method-assign]


def slice_bias(output: Any, ranges: PositionRanges) -> None:
    """Change an `OutputLinear` layer so that the gradient of its bias is summed range by range. Independent."""
    if output.bias is not None:
        output.add_bias = lambda y: y + _Spread.apply(output.bias, y, ranges).to(y.dtype)  # type: ignore[no-untyped-call]


def slice_mix(mix: Any, ranges: PositionRanges) -> None:
    """Change an `InputMix` layer so that the gradients of its factors are summed range by range. Independent."""

    def forward(x: Tensor, x0: Tensor) -> Tensor:
        a, b = (_Spread.apply(factor, x, ranges) for factor in mix.weight.to(x.dtype))  # type: ignore[no-untyped-call]
        return a * x + b * x0  # type: ignore[no-any-return]

    mix.forward = forward


def slice_table(table: Any, ranges: PositionRanges) -> None:
    """Change a table of learned positions so that its gradient is summed range by range. Independent."""

    def forward(places: Tensor) -> Tensor:
        copies = Copies.apply(table.weight, ranges.count, ranges.add)  # type: ignore[no-untyped-call]
        parts = zip(ranges.cut(places, places.dim() - 1), copies, strict=True)
        return torch.cat([F.embedding(part, copy) for part, copy in parts], dim=-2)

    table.forward = forward

"""Computes the loss without storing all logits. The head and the cross entropy are applied to one chunk of positions at a time.

Forward also computes the gradients of a chunk. A chunk therefore needs three matrix products, as many as without chunks (Hsu
2024, "Liger Kernel", section 3.2). Memory is needed for one chunk of logits, for the gradient of the hidden states (N, D), and
for the gradient of the head (V, D). N: positions, D: model_dim, V: vocabulary. The losses of chunks are added in order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import Tensor

from mpidp.model.lora import weight_of
from mpidp.model.products import product
from mpidp.model.shape import Shape, TransformerShape
from mpidp.parallel.tensor_comm import TensorComm
from mpidp.parallel.tree_comm import tree_sum


class _ChunkedLoss(torch.autograd.Function):
    """Computes the sum of -log softmax(logits)[target] over positions. The logits are the soft-capped values of
    scale * hidden W^T. weights: the rows of W, divided into consecutive slices."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, loss: ChunkedLoss, trains: bool, *weights: Tensor) -> Tensor:
        x, ws = hidden.to(loss.dtype), [weight.to(loss.dtype) for weight in weights]
        for_hidden = torch.empty_like(hidden) if trains else None
        for_weights = [torch.zeros_like(weight) if trains and weight.requires_grad else None for weight in weights]
        total, times = torch.zeros((), device=hidden.device), product if trains else F.linear
        for start in range(0, len(hidden), loss.rows):
            chunk = slice(start, start + loss.rows)
            logits = [times(x[chunk], w).float() for w in ws]
            slopes = [loss.capped(one) for one in logits]
            total += loss.into_gradient(logits, targets[chunk], trains)
            if for_hidden is not None:
                of_slices = []
                for one, slope, w, for_weight in zip(logits, slopes, ws, for_weights, strict=True):
                    grad = (one if slope is None else one.mul_(slope)).to(loss.dtype)
                    of_slices.append(times(grad, w.T))
                    if for_weight is not None and loss.dtype == torch.float32:
                        for_weight.addmm_(grad.T, x[chunk])
                    elif for_weight is not None:
                        for_weight.add_(grad.T @ x[chunk])
                for_hidden[chunk] = loss.add(of_slices)
                del grad, one, slope, of_slices
            del logits, slopes  # otherwise both would use memory until the next chunk replaces them
        ctx.save_for_backward(for_hidden, *for_weights)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        for_hidden, *for_weights = ctx.saved_tensors
        of_weights = (None if for_weight is None else for_weight * grads[0] for for_weight in for_weights)
        return for_hidden * grads[0], None, None, None, *of_weights


class ChunkedLoss:
    """A function (hidden, targets) -> sum of losses, for a model that returns hidden states (Transformer.defer_head).

    hidden: hidden states (N, D). targets: (N,). A target of -100 is ignored. On every rank, both tensors have all positions,
    also with sequence parallelism.
    """

    def __init__(
        self, shape: TransformerShape, weights: Callable[[], Sequence[Tensor]], rows: int, dtype: torch.dtype, first: int = 0,
        tp: TensorComm | None = None, add: Callable[[Sequence[Tensor]], Tensor] = tree_sum,
    ) -> None:
        """weights: a function that returns this rank's rows of the head's weight matrix, as one tensor (vocabulary rows, D)
        per slice (range of rows). Without model.slices, there is one slice. rows: positions per chunk. dtype: the dtype of
        matrix products. first: the token id to which this rank's first row belongs. tp: communicates with the ranks that have
        the other rows, or None if this rank has all rows. add: a function that adds the contributions of the slices to the
        gradient of the hidden states."""
        self.scale, self.cap, self.rows, self.dtype, self.add = shape.logit_scale, shape.logit_cap, rows, dtype, add
        self._weights, self._first, self._tp = weights, first, tp

    def __call__(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the losses. Collective over tp.comm if the vocabulary is divided among ranks, else independent."""
        trains = torch.is_grad_enabled()
        found: Tensor = _ChunkedLoss.apply(hidden, targets, self, trains, *self._weights())  # type: ignore[no-untyped-call]
        return found

    def capped(self, logits: Tensor) -> Tensor | None:
        """Apply the scale and the soft-cap to `logits` in place. Return the derivative of the result with respect to the logits,
        or None if it is 1 everywhere."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if not self.cap:
            return None if self.scale == 1.0 else logits.new_tensor(self.scale)
        logits.div_(self.cap).tanh_()
        slope = (1 - logits.square()).mul_(self.scale)
        logits.mul_(self.cap)
        return slope

    def into_gradient(self, slices: list[Tensor], targets: Tensor, trains: bool) -> Tensor:
        """Return the sum of the losses. slices: one tensor of logits per slice (range of token ids). This method overwrites
        these tensors. If `trains` is True, they then contain the gradient of the returned sum with respect to the logits."""
        largest = functools.reduce(torch.maximum, [logits.max(dim=-1, keepdim=True).values for logits in slices])
        if self._tp is not None:
            largest = self._tp.sum(largest, MPI.MAX)
        counted, first, places, sums = targets != -100, self._first, [], []
        for logits in slices:
            local, first = targets - first, first + logits.shape[-1]
            here = (local >= 0) & (local < logits.shape[-1])
            place = local.where(here, 0).unsqueeze(-1)
            places.append((here, place))
            of_target = (logits.gather(-1, place) - largest).squeeze(-1).where(here, 0.0)
            sums.append(torch.stack([logits.sub_(largest).exp_().sum(-1), of_target]))
        both = tree_sum(sums)
        total, of_target = both if self._tp is None else self._tp.sum(both)
        if trains:
            for logits, (here, place) in zip(slices, places, strict=True):
                logits.mul_((counted / total).unsqueeze(-1))
                logits.scatter_add_(-1, place, -(here & counted).to(logits.dtype).unsqueeze(-1))
        return (total.log() - of_target).where(counted, 0.0).sum()


def defer_head(
    model: Any, shape: Shape, rows: int, dtype: torch.dtype, first: int, tp: TensorComm | None,
    weights: Callable[[], Sequence[Tensor]] | None = None, add: Callable[[Sequence[Tensor]], Tensor] = tree_sum,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Change `model`, a Transformer or a part of one, so that it returns hidden states instead of logits. Return a
    `ChunkedLoss` object, which computes the loss from these hidden states. The other arguments are those of ChunkedLoss. If
    `weights` is None, the head is one matrix. Independent."""
    assert isinstance(shape, TransformerShape)
    model.defer_head()
    return ChunkedLoss(shape, weights or (lambda: [weight_of(model.head)]), rows, dtype, first, tp, add)

"""Computes the loss without storing all logits. The head and the cross entropy are applied to a chunk of positions at a time.

The gradients of a chunk are computed and stored together with the loss of the chunk. A chunk therefore needs three matrix
products, as many as without chunks (Hsu 2024, "Liger Kernel", section 3.2). N is the number of positions, D is model_dim, and V
is the size of the vocabulary. The loss needs memory for one chunk of logits and for two gradients. The gradient of the hidden
states has N x D elements, and the gradient of the head has V x D elements. The losses of chunks are added in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import Tensor

from mpidp.model.products import product
from mpidp.model.shape import Shape, TransformerShape
from mpidp.parallel.tensor_comm import TensorComm


class _ChunkedLoss(torch.autograd.Function):
    """The sum of -log softmax(logits)[target], where logits = cap(scale * hidden weight^T)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, loss: ChunkedLoss, trains: bool) -> Tensor:
        x, w = hidden.to(loss.dtype), weight.to(loss.dtype)
        for_hidden = torch.empty_like(hidden) if trains else None
        for_weight = torch.zeros_like(weight) if trains and weight.requires_grad else None
        total, times = torch.zeros((), device=hidden.device), product if trains else F.linear
        for start in range(0, len(hidden), loss.rows):
            chunk = slice(start, start + loss.rows)
            logits = times(x[chunk], w).float()
            slope = loss.capped(logits)
            total += loss.into_gradient(logits, targets[chunk], trains)
            if for_hidden is not None:
                if slope is not None:
                    logits.mul_(slope)
                grad = logits.to(loss.dtype)
                for_hidden[chunk] = times(grad, w.T)
                if for_weight is not None:
                    for_weight.addmm_(grad.T, x[chunk]) if loss.dtype == torch.float32 else for_weight.add_(grad.T @ x[chunk])
                del grad
            del logits, slope  # otherwise both would use memory until the next chunk replaces them
        ctx.save_for_backward(for_hidden, for_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        for_hidden, for_weight = ctx.saved_tensors
        return for_hidden * grads[0], None if for_weight is None else for_weight * grads[0], None, None, None


class ChunkedLoss:
    """A callable (hidden states, targets) -> sum of losses, for a model that returns hidden states (Transformer.defer_head).

    hidden: (N, D). targets: (N,), where -100 is ignored. Both contain all positions, also with sequence parallelism.
    """

    def __init__(
        self, shape: TransformerShape, weight: Callable[[], Tensor], rows: int, dtype: torch.dtype, first: int = 0,
        tp: TensorComm | None = None,
    ) -> None:
        """weight: returns this rank's rows of the head's weight, (rows, D). rows: number of positions per chunk. dtype: dtype of
        the matrix products. first: token id of the first row of the weight. tp: communicates with the ranks that have the other
        rows of the weight, or None if this rank has all rows."""
        self.scale, self.cap, self.rows, self.dtype = shape.logit_scale, shape.logit_cap, rows, dtype
        self._weight, self._first, self._tp = weight, first, tp

    def __call__(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the losses. Collective over tp.comm if the vocabulary is divided among ranks. Otherwise
        independent."""
        trains = torch.is_grad_enabled()
        found: Tensor = _ChunkedLoss.apply(hidden, self._weight(), targets, self, trains)  # type: ignore[no-untyped-call]
        return found

    def capped(self, logits: Tensor) -> Tensor | None:
        """Apply the scale and the soft-cap to the logits in place. Return the derivative of this function, or None if it is 1
        everywhere."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if not self.cap:
            return None if self.scale == 1.0 else logits.new_tensor(self.scale)
        logits.div_(self.cap).tanh_()
        slope = (1 - logits.square()).mul_(self.scale)
        logits.mul_(self.cap)
        return slope

    def into_gradient(self, logits: Tensor, targets: Tensor, trains: bool) -> Tensor:
        """Return the sum of the losses. If `trains` is true, overwrite the logits with the gradient of this sum."""
        largest = logits.max(dim=-1, keepdim=True).values
        if self._tp is not None:
            largest = self._tp.sum(largest, MPI.MAX)
        counted, local = targets != -100, targets - self._first
        here = (local >= 0) & (local < logits.shape[-1])
        place = local.where(here, 0).unsqueeze(-1)
        of_target = (logits.gather(-1, place) - largest).squeeze(-1).where(here, 0.0)
        total = logits.sub_(largest).exp_().sum(-1)
        if self._tp is not None:
            total, of_target = self._tp.sum(torch.stack([total, of_target]))
        if trains:
            logits.mul_((counted / total).unsqueeze(-1))
            logits.scatter_add_(-1, place, -(here & counted).to(logits.dtype).unsqueeze(-1))
        return (total.log() - of_target).where(counted, 0.0).sum()


def defer_head(
    model: Any, shape: Shape, rows: int, dtype: torch.dtype, first: int, tp: TensorComm | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Change a Transformer, or a part of one, so that it returns hidden states. Return the function that computes the loss from
    hidden states. ChunkedLoss describes the arguments. Independent."""
    assert isinstance(shape, TransformerShape)
    model.defer_head()
    return ChunkedLoss(shape, lambda: model.head.weight, rows, dtype, first, tp)

"""What tensor parallelism adds to a part of the model, from outside: sums over the ranks that share its layers.

Megatron-LM (Shoeybi 2019, section 3): where a branch begins its input is everybody's, and its gradient is summed in backward (f);
where it ends what each rank has of it is summed in forward, and its gradient is everybody's (g). The vocabulary is cut too: rows
of the embedding that are elsewhere add zero, and the loss is computed from each rank's own logits (section 3, "parallel
cross-entropy"): a maximum, a sum and the target's logit are all that is sent. Sums are float32, whatever the layers compute in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import Tensor, nn

from mpidp.comm.buffers import buf
from mpidp.comm.grid import Grid
from mpidp.comm.transport import Messages


class Ring:
    """The ranks of a stage, and how a tensor is summed over them. The same bits on all of them."""

    def __init__(self, grid: Grid, transport: Messages) -> None:
        self.comm, self._wait, self._transport = grid.tp, grid.wait, transport

    def sum(self, x: Tensor, op: MPI.Op = MPI.SUM) -> Tensor:
        """Of every rank's x, of any shape: a new tensor of its dtype. Collective over comm."""
        with torch.no_grad():
            total = x.detach().to(torch.float32, copy=True).contiguous()
            flat = total.view(-1)
            with self._transport.timed():
                wire = self._transport.load(flat, "tensor_parallel")
                self._wait(self.comm.Iallreduce(MPI.IN_PLACE, buf(wire), op=op))
                self._transport.store(wire, flat)
            self._transport.sent_bytes += 2 * flat.nbytes * (self.comm.size - 1) // self.comm.size
            return total.to(x.dtype)


class _Begin(torch.autograd.Function):
    """f: the identity; in backward a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ring: Ring) -> Tensor:
        ctx.ring = ring
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.ring.sum(grads[0]), None


class _End(torch.autograd.Function):
    """g: a sum; in backward the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ring: Ring) -> Tensor:
        return ring.sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class Rows(nn.Module):
    """An embedding of which this rank has the rows from `first` on."""

    def __init__(self, embedding: nn.Embedding, first: int, ring: Ring) -> None:
        super().__init__()
        self.weight, self.first, self._ring = embedding.weight, first, ring

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        local = tokens - self.first
        here = (local >= 0) & (local < len(self.weight))
        found = F.embedding(local.where(here, 0), self.weight) * here.unsqueeze(-1)
        return _End.apply(found, self._ring)  # type: ignore[no-any-return, no-untyped-call]


class _Loss(torch.autograd.Function):
    """Sum of -log softmax(logits)[target] over rows whose logits lie in slices on the ranks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, ring: Ring) -> Tensor:
        largest = ring.sum(logits.max(dim=-1).values, MPI.MAX)
        exponents = (logits - largest.unsqueeze(-1)).exp()
        local = targets - first
        here = (local >= 0) & (local < logits.shape[-1])
        place = local.where(here, 0).unsqueeze(-1)
        of_target = (logits.gather(-1, place).squeeze(-1) - largest).where(here, 0.0)
        total, of_target = ring.sum(torch.stack([exponents.sum(-1), of_target]))
        counts = targets != -100
        ctx.save_for_backward(exponents, total, place, here, counts)
        return (total.log() - of_target).where(counts, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        exponents, total, place, here, counts = ctx.saved_tensors
        grad = exponents / total.unsqueeze(-1)
        grad.scatter_add_(-1, place, -here.to(grad.dtype).unsqueeze(-1))
        return grad * (counts.unsqueeze(-1) * grads[0]), None, None, None


def loss_over(ring: Ring, first: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The sum of token losses from this rank's logits (N, V of this rank), whose first column is id `first`, and targets (N,), of
    which -100 does not count. The same on every rank of a stage."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = _Loss.apply(logits, targets, first, ring)  # type: ignore[no-untyped-call]
        return found

    return loss


def share_layers(model: Any, ring: Ring) -> None:
    """Make a part of a Transformer compute its share of every layer together with the other ranks of its stage. Independent."""

    def begin(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return _Begin.apply(args[0], ring), *args[1:]  # type: ignore[no-untyped-call]

    def end(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _End.apply(output, ring)  # type: ignore[no-any-return, no-untyped-call]

    for block in model.blocks.values():
        for branch in (block.attention, block.feed_forward):
            branch.register_forward_pre_hook(begin)
            branch.register_forward_hook(end)
    if model.embedding is not None:
        model.embedding = Rows(model.embedding, model.part.share(model.shape.vocab_size).start, ring)
    if model.head is not None:
        model.head.register_forward_pre_hook(begin)

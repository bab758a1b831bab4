"""What tensor parallelism adds to a part of the model, from outside: sums over the ranks that share its layers.

Megatron-LM (Shoeybi 2019, section 3): where a branch begins its input is everybody's, and its gradient is summed in backward (f);
where it ends what each rank has of it is summed in forward, and its gradient is everybody's (g). The vocabulary is cut too: rows
of the embedding that are elsewhere add zero, and the loss is computed from each rank's own logits (section 3, "parallel
cross-entropy"): a maximum, a sum and the target's logit are all that is sent. Sums are float32, whatever the layers compute in.

Sequence parallelism (Korthikanti 2022, section 4.2.2): between branches a rank has its positions alone. f gathers them, and adds and
shares out their gradients in backward; g adds and shares out, and gathers gradients. Norms then see a part of the positions:
their gains pass through the other f, which adds what each rank has of their gradients, micro-batch by micro-batch, so that
they are equal for whoever comes after: lanes, replicas, optimizers.
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

    def __init__(self, grid: Grid, transport: Messages, sequence: bool = False) -> None:
        """sequence: are positions shared out between branches?"""
        self.comm, self._wait, self._transport, self.sequence = grid.tp, grid.wait, transport, sequence
        self.length = 0  # positions of the sequences that are computed now

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

    def _cut(self, length: int, each: int) -> tuple[list[int], list[int]]:
        """(numbers, starts) of `each` numbers a position, of every rank's positions: as Part.share has them."""
        bounds = [i * length // self.comm.size * each for i in range(self.comm.size + 1)]
        return [b - a for a, b in zip(bounds, bounds[1:], strict=False)], bounds[:-1]

    def gather(self, x: Tensor, length: int) -> Tensor:
        """(B, this rank's positions, D) -> (B, length, D). Collective over comm."""
        with torch.no_grad():
            b, _, d = x.shape
            whole = torch.empty(length, b, d, device=x.device)
            counts, starts = self._cut(length, b * d)
            flat, rank = whole.view(-1), self.comm.rank
            flat[starts[rank] : starts[rank] + counts[rank]] = x.detach().transpose(0, 1).reshape(-1)
            with self._transport.timed():
                wire = self._transport.load(flat, "sequence")
                self._transport.allgatherv(self.comm, self._wait, (wire, counts, starts))
                self._transport.store(wire, flat)
            return whole.transpose(0, 1).to(x.dtype).contiguous()

    def scatter(self, x: Tensor) -> Tensor:
        """Of the sum of every rank's x, (B, length, D), this rank's positions. Collective over comm."""
        with torch.no_grad():
            b, length, d = x.shape
            counts, _ = self._cut(length, b * d)
            flat = x.detach().transpose(0, 1).float().reshape(-1)
            mine = torch.empty(counts[self.comm.rank], device=x.device)
            with self._transport.timed():
                wire, out = self._transport.load(flat, "sequence"), self._transport.load(mine, "sequence_sum")
                self._wait(self.comm.Ireduce_scatter(buf(wire), buf(out), counts))
                self._transport.store(out, mine)
            self._transport.sent_bytes += flat.nbytes - mine.nbytes
            return mine.view(-1, b, d).transpose(0, 1).to(x.dtype).contiguous()


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


class _Gather(torch.autograd.Function):
    """f of a sequence in parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ring: Ring) -> Tensor:
        ctx.ring = ring
        return ring.gather(x, ring.length)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.ring.scatter(grads[0]), None


class _Scatter(torch.autograd.Function):
    """g of a sequence in parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ring: Ring) -> Tensor:
        ctx.ring, ctx.length = ring, x.shape[1]
        return ring.scatter(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.ring.gather(grads[0], ctx.length), None


def _begin(x: Tensor, ring: Ring) -> Tensor:
    """f."""
    return (_Gather if ring.sequence else _Begin).apply(x, ring)  # type: ignore[no-any-return, no-untyped-call]


def _end(x: Tensor, ring: Ring) -> Tensor:
    """g."""
    return (_Scatter if ring.sequence else _End).apply(x, ring)  # type: ignore[no-any-return, no-untyped-call]


class Norm(nn.Module):
    """An RMSNorm of this rank's positions."""

    def __init__(self, norm: nn.RMSNorm, ring: Ring) -> None:
        super().__init__()
        self.weight, self.eps, self._ring = norm.weight, norm.eps, ring

    def forward(self, x: Tensor) -> Tensor:
        """(B, t, D) -> (B, t, D)."""
        gain = _Begin.apply(self.weight, self._ring)  # type: ignore[no-untyped-call]
        return F.rms_norm(x, self.weight.shape, gain, self.eps)


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
        return _end(found, self._ring)


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

    def enter(block: nn.Module, args: tuple[Any, ...]) -> None:
        ring.length = args[1].shape[-2]  # of the rotary table: x may have a part of the positions

    def begin(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return _begin(args[0], ring), *args[1:]

    def end(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _end(output, ring)

    for block in model.blocks.values():
        block.register_forward_pre_hook(enter)
        for branch in (block.attention, block.feed_forward):
            branch.register_forward_pre_hook(begin)
            branch.register_forward_hook(end)
        if ring.sequence:
            block.attention_norm, block.feed_forward_norm = Norm(block.attention_norm, ring), Norm(block.feed_forward_norm, ring)
    if model.embedding is not None:
        model.embedding = Rows(model.embedding, model.part.share(model.shape.vocab_size).start, ring)
    if model.head is not None:
        if ring.sequence:
            model.norm = Norm(model.norm, ring)
        model.head.register_forward_pre_hook(begin)

"""The ranks that share the layers of a stage: sums over them, positions in parts, and both as autograd sees them (f and g).

Sums are float32, whatever the layers compute in; positions are gathered as they are. The same bits on all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.buffers import buf
from mpidp.comm.transport import Messages
from mpidp.parallel.grid import Grid


class TensorComm:
    """The ranks of a stage, and how tensors are summed and gathered over them."""

    def __init__(self, grid: Grid, transport: Messages, sequence: bool = False) -> None:
        """sequence: are positions shared out between branches?"""
        self.comm, self._wait, self._transport, self.sequence = grid.tp, grid.wait, transport, sequence
        self.length = 0  # positions of the sequences that are computed now

    def sum(self, x: Tensor, op: MPI.Op = MPI.SUM) -> Tensor:
        """Of every rank's x, of any shape: a new tensor of its dtype. Collective over comm."""
        with torch.no_grad():
            total = x.detach().to(torch.float32, copy=True).contiguous()
            flat = total.view(-1)
            wire = self._transport.load(flat, "tensor_parallel")
            self._wait(self.comm.Iallreduce(MPI.IN_PLACE, buf(wire), op=op))
            self._transport.store(wire, flat)
            self._transport.sent_bytes += 2 * flat.nbytes * (self.comm.size - 1) // self.comm.size
            return total.to(x.dtype)

    def _cut(self, length: int, each: int) -> tuple[list[int], list[int]]:
        """(counts, starts) of every rank's positions, in units of which there are `each` a position: cut as Part.share does."""
        bounds = [i * length // self.comm.size * each for i in range(self.comm.size + 1)]
        return [b - a for a, b in zip(bounds, bounds[1:], strict=False)], bounds[:-1]

    def gather(self, x: Tensor, length: int) -> Tensor:
        """(B, this rank's positions, D) of every rank -> (B, length, D). Collective over comm."""
        with torch.no_grad():
            b, _, d = x.shape
            whole = torch.empty(length, b, d, dtype=x.dtype, device=x.device)
            counts, starts = self._cut(length, b * d * x.element_size())
            start = starts[self.comm.rank]
            flat = whole.view(-1).view(torch.uint8)
            flat[start : start + counts[self.comm.rank]] = x.detach().transpose(0, 1).reshape(-1).view(torch.uint8)
            wire = self._transport.load(flat, "gather")
            self._transport.allgatherv(self.comm, self._wait, (wire, counts, starts))
            self._transport.store(wire, flat)
            return whole.transpose(0, 1).contiguous()

    def scatter(self, x: Tensor) -> Tensor:
        """Of the sum of every rank's x, (B, length, D), this rank's positions. Collective over comm."""
        with torch.no_grad():
            b, length, d = x.shape
            counts, _ = self._cut(length, b * d)
            flat = x.detach().transpose(0, 1).float().reshape(-1)
            mine = torch.empty(counts[self.comm.rank], device=x.device)
            wire, out = self._transport.load(flat, "scatter"), self._transport.load(mine, "scattered")
            self._wait(self.comm.Ireduce_scatter(buf(wire), buf(out), counts))
            self._transport.store(out, mine)
            self._transport.sent_bytes += flat.nbytes - mine.nbytes
            return mine.view(-1, b, d).transpose(0, 1).to(x.dtype).contiguous()


class SumInBackward(torch.autograd.Function):
    """The identity; in backward a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorComm) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.tp.sum(grads[0]), None


class SumInForward(torch.autograd.Function):
    """g: a sum; in backward the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorComm) -> Tensor:
        return tp.sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Gather(torch.autograd.Function):
    """f of a sequence in parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorComm) -> Tensor:
        ctx.tp = tp
        return tp.gather(x, tp.length)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.tp.scatter(grads[0]), None


class _Scatter(torch.autograd.Function):
    """g of a sequence in parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorComm) -> Tensor:
        ctx.tp, ctx.length = tp, x.shape[1]
        return tp.scatter(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.tp.gather(grads[0], ctx.length), None


def enter_branch(x: Tensor, tp: TensorComm) -> Tensor:
    """f: (B, T, D), or this rank's positions of it -> (B, T, D). Backward is collective over comm; where positions are in
    parts this is, too."""
    return (_Gather if tp.sequence else SumInBackward).apply(x, tp)  # type: ignore[no-any-return, no-untyped-call]


def leave_branch(x: Tensor, tp: TensorComm) -> Tensor:
    """g: of the sum of every rank's (B, T, D), all, or this rank's positions. Collective over comm."""
    return (_Scatter if tp.sequence else SumInForward).apply(x, tp)  # type: ignore[no-any-return, no-untyped-call]

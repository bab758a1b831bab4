"""Communication between the tensor-parallel ranks of a stage: sums, gathers, reduce-scatters, and the functions f and g of
tensor.py.

Sums are computed in float32 in any training precision. Gathers keep the dtype. Results that all ranks receive have the same
bits on every rank.
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
    """Sums and gathers over the tensor-parallel ranks of a stage."""

    def __init__(self, grid: Grid, transport: Messages, sequence: bool = False) -> None:
        """sequence: whether each rank has only its own positions between branches (sequence parallelism). Independent."""
        self.sequence = sequence
        self.length = 0  # number of positions of the current sequences
        self.use(grid, transport)

    def use(self, grid: Grid, transport: Messages) -> None:
        """Communicate in the mesh `grid` from now on. Call this for example after ranks have failed. Independent."""
        self.comm, self._wait, self._transport = grid.tp, grid.wait, transport

    def sum(self, x: Tensor, op: MPI.Op = MPI.SUM) -> Tensor:
        """Return the sum of `x` over the ranks, as a new tensor with the shape and dtype of `x`. op: the MPI reduction to use
        instead of the sum. Collective over comm."""
        with torch.no_grad():
            total = x.detach().to(torch.float32, copy=True).contiguous()
            flat = total.view(-1)
            wire = self._transport.load(flat, "tensor_parallel")
            self._wait(self.comm.Iallreduce(MPI.IN_PLACE, buf(wire), op=op))
            self._transport.store(wire, flat)
            self._transport.sent_bytes += 2 * flat.nbytes * (self.comm.size - 1) // self.comm.size
            return total.to(x.dtype)

    def _cut(self, length: int, each: int) -> tuple[list[int], list[int]]:
        """Return (counts, starts): the number of elements of each rank's positions, and the index of the first of these
        elements. length: number of positions. each: elements per position. Positions are divided as in Part.own_range."""
        bounds = [i * length // self.comm.size * each for i in range(self.comm.size + 1)]
        return [b - a for a, b in zip(bounds, bounds[1:], strict=False)], bounds[:-1]

    def gather(self, x: Tensor, length: int) -> Tensor:
        """Gather the positions of all ranks, and return them as one tensor (B, length, D). x: (B, t, D), the t positions of
        this rank. Collective over comm."""
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
        """Sum `x` over the ranks, and return this rank's positions of the sum, (B, t, D). x: (B, length, D). Collective over
        comm."""
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
    """The function f of tensor.py. It is the identity in forward and a sum over ranks in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorComm) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.tp.sum(grads[0]), None


class SumInForward(torch.autograd.Function):
    """The function g of tensor.py. It is a sum over ranks in forward and the identity in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorComm) -> Tensor:
        return tp.sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Gather(torch.autograd.Function):
    """The function f with sequence parallelism. It gathers in forward and reduce-scatters in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorComm) -> Tensor:
        ctx.tp = tp
        return tp.gather(x, tp.length)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.tp.scatter(grads[0]), None


class _Scatter(torch.autograd.Function):
    """The function g with sequence parallelism. It reduce-scatters in forward and gathers in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorComm) -> Tensor:
        ctx.tp, ctx.length = tp, x.shape[1]
        return tp.scatter(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.tp.gather(grads[0], ctx.length), None


def enter_branch(x: Tensor, tp: TensorComm) -> Tensor:
    """Apply the function f of tensor.py to `x`, the input of a branch (attention or MLP). Return (B, T, D). x: (B, T, D). With
    sequence parallelism, `x` is (B, t, D) and has only this rank's positions. Backward is collective over tp.comm. With sequence
    parallelism this call is also collective over tp.comm."""
    return (_Gather if tp.sequence else SumInBackward).apply(x, tp)  # type: ignore[no-any-return, no-untyped-call]


def leave_branch(x: Tensor, tp: TensorComm) -> Tensor:
    """Apply the function g of tensor.py at the end of a branch (attention or MLP): return the sum of `x` over the ranks,
    (B, T, D). With sequence parallelism, return only this rank's positions of the sum, (B, t, D). Collective over tp.comm. With
    sequence parallelism, backward is also collective over tp.comm."""
    return (_Scatter if tp.sequence else SumInForward).apply(x, tp)  # type: ignore[no-any-return, no-untyped-call]


def sum_both_ways(x: Tensor, tp: TensorComm) -> Tensor:
    """Return the sum of `x` over the ranks. Backward also sums the gradient over the ranks. Use this if each rank uses the result
    for its own heads. Collective over tp.comm, also in backward."""
    return SumInBackward.apply(SumInForward.apply(x, tp), tp)  # type: ignore[no-any-return, no-untyped-call]

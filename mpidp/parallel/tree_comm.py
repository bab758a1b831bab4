"""Sums over the tensor-parallel ranks of a stage in the order of a fixed binary tree (model.slices).

The tree's leaves are the S slices of the model (1 / S of each layer). S is a power of two. Each of T ranks has S / T successive
slices, which are the leaves of a complete subtree. First, each rank adds its own slices. Then the ranks' partial sums are added
in the order of the same tree. The additions are the same for every T. Therefore the bits of the sum do not depend on T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.slices import slice_bounds
from mpidp.parallel.tensor_comm import TensorComm


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of the tensors `parts`, added in the order of a binary tree (reducers/tree_order.py). The number of tensors
    is a power of two. All have the same shape and dtype. Pure."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


ALIGNMENT = {"cpu": 64, "cuda": 256}  # bytes; torch allocates new tensors with at least this alignment


def aligned(x: Tensor) -> Tensor:
    """Return `x` if it is contiguous and aligned like a new tensor. Otherwise return a copy that is both. Pure."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT.get(x.device.type, 1) == 0 else x.clone()


class TreeComm(TensorComm):
    """Sums and gathers over the tensor-parallel ranks of a stage. The number of these ranks is a power of two. A sum sends as
    many bytes as an allreduce."""

    def sum(self, x: Tensor, op: MPI.Op = MPI.SUM) -> Tensor:
        """Return the sum of `x` over the ranks in tree order, as a new tensor with the shape and dtype of `x`. op: the MPI
        reduction to use instead of the sum. Reductions other than the sum do not use the tree. Collective over comm."""
        if op != MPI.SUM:
            return super().sum(x, op)
        with torch.no_grad():
            total = x.detach().to(torch.float32, copy=True).contiguous()
            if self.comm.size > 1:
                self._add(total.view(-1))
            return total.to(x.dtype)

    def scatter(self, x: Tensor) -> Tensor:
        """Sum `x` over the ranks in tree order, and return this rank's positions of the sum, (B, t, D). x: (B, length, D).
        Collective over comm."""
        with torch.no_grad():
            b, length, d = x.shape
            counts, starts = self._cut(length, b * d)
            flat = x.detach().transpose(0, 1).float().reshape(-1)
            wire = self._transport.load(flat, "scatter")
            mine = self._sum_of_parts(wire, counts, starts).to(x.device)
            return mine.view(-1, b, d).transpose(0, 1).to(x.dtype).contiguous()

    def _add(self, flat: Tensor) -> None:
        """Replace `flat`, (n,), by its sum over the ranks. Each rank adds one range of the elements. Collective over comm."""
        comm, wire = self.comm, self._transport.load(flat, "tensor_parallel")
        bounds = slice_bounds(flat.numel(), comm.size)
        counts = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        own = wire[bounds[comm.rank] : bounds[comm.rank + 1]]
        own.copy_(self._sum_of_parts(wire, counts, bounds[:-1]))
        self._transport.ready()
        self._transport.allgatherv(comm, self._wait, (wire, counts, bounds[:-1]))
        self._transport.store(wire, flat)

    def _sum_of_parts(self, wire: Tensor, counts: list[int], starts: list[int]) -> Tensor:
        """Sum this rank's range of `wire` over the ranks, and return the sum. counts, starts: the length and the start of each
        rank's range. Collective over comm."""
        comm, length = self.comm, counts[self.comm.rank]
        received = self._transport.scratch("parts", comm.size * length)
        others = [r != comm.rank for r in range(comm.size)]
        sends = [n * other for n, other in zip(counts, others, strict=True)]
        places = [r * length for r in range(comm.size)]
        self._transport.alltoallv(comm, self._wait, (wire, sends, starts), (received, [length * o for o in others], places))
        parts = list(received.view(comm.size, length).unbind())
        parts[comm.rank] = wire[starts[comm.rank] : starts[comm.rank] + length]
        return tree_sum(parts)

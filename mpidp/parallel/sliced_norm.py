"""Computes the norm of a gradient slice by slice, so that the bits of the norm do not depend on the mesh. A slice is one of the
ranges into which model.slices divides a parameter. A parameter that is not divided counts as one slice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.buffers import buf
from mpidp.comm.slices import NORM_BLOCK, norm_of_squares, round_up, squares_of_blocks
from mpidp.model.part import Part
from mpidp.parallel.grid import Grid
from mpidp.reducers.buckets import FlatLayout


class NormBySlices:
    """Computes the L2 norm of a gradient over the whole model. The elements of each slice of a parameter are cut into norm
    blocks of 4,096 elements. The last block of a slice is padded with zeros. The sums of squares of the blocks are added in a
    fixed order: by parameter, by slice, and by block."""

    def __init__(
        self, grid: Grid, part: Part, sizes: Mapping[str, tuple[int, ...]], slices: int, counts: Callable[[str], bool]
    ) -> None:
        """sizes: the shapes of the whole model's parameters. slices: model.slices. counts: returns whether this rank counts the
        parameter with a given name (ModelPartition.counts). Independent."""
        self._grid, self._part, self._sizes, self._slices, self._counts = grid, part, sizes, slices, counts
        self._order = torch.empty(0, dtype=torch.int64)  # indices of the blocks of all ranks, in the order of addition
        self._lengths: list[int] = []  # number of blocks of each rank; empty before the first call

    def __call__(self, layout: FlatLayout, flat: Tensor) -> float:
        """Return the norm. flat: the gradient of this rank's part, (num_elements,). Collective over grid.model."""
        placed = [(name, view) for (_, name, _), view in zip(layout.placed(), layout.views(flat), strict=True)]
        squares = torch.cat([squares_of_piece(piece) for name, view in placed for piece in self.pieces(name, view)])
        self.mark(squares, [view for name, view in placed if not self._counts(name)])
        return self.of_squares(layout, squares)

    def mark(self, squares: Tensor, uncounted: Sequence[Tensor]) -> None:
        """If a value of `uncounted` is not finite, set the first element of `squares` to NaN, so that the norm is NaN.
        uncounted: this rank's gradients of the parameters that another rank counts. After a hardware fault, they can differ
        from the gradients of that rank. Independent."""
        if uncounted and not torch.stack([one.isfinite().all() for one in uncounted]).all():
            squares[0] = torch.nan

    def cut(self, name: str) -> tuple[int, list[int]] | None:
        """Return (the dimension along which a parameter of this part is cut into slices, the lengths of this rank's slices),
        or None if the parameter is not cut. Independent."""
        whole = self._part.global_name(name)
        return self._part.slices(whole, self._sizes[whole], self._slices)

    def pieces(self, name: str, tensor: Tensor) -> Sequence[Tensor]:
        """Cut a tensor of a parameter's shape into slices, and return the slices. Return an empty list if another rank counts
        the parameter. Independent."""
        if not self._counts(name):
            return []
        cut = self.cut(name)
        return [tensor] if cut is None else tensor.split(cut[1], cut[0])

    def of_squares(self, layout: FlatLayout, squares: Tensor) -> float:
        """Return the norm of a gradient, given the sums of squares of its norm blocks. squares: these sums for this rank's part
        of the model, slice by slice in flat order. Collective over grid.model."""
        mine, comm = squares.cpu(), self._grid.model
        if not self._lengths:
            names, first = list(self._sizes), self._part.index * self._slices // self._part.size
            self._plan(comm.allgather([
                (names.index(self._part.global_name(name)), number, round_up(piece.numel(), NORM_BLOCK) // NORM_BLOCK)
                for _, name, p in layout.placed()
                for number, piece in enumerate(self.pieces(name, torch.empty(p.shape, device="meta")), first)
            ]))
        if comm.size == 1:
            return norm_of_squares(mine[self._order])
        everything = torch.empty(sum(self._lengths), dtype=torch.float64)
        places = np.cumsum([0, *self._lengths[:-1]]).tolist()
        self._grid.wait(comm.Iallgatherv(buf(mine), [buf(everything)[0], (self._lengths, places), MPI.DOUBLE]))
        return norm_of_squares(everything[self._order])

    def _plan(self, keys: list[list[tuple[int, int, int]]]) -> None:
        """Set the order of the blocks. keys: a list for each rank, with (index of the parameter, slice, number of blocks) of each
        slice that the rank counts."""
        blocks = [(name, number, at) for rank in keys for name, number, length in rank for at in range(length)]
        self._order = torch.tensor(sorted(range(len(blocks)), key=blocks.__getitem__))
        self._lengths = [sum(length for _, _, length in rank) for rank in keys]


def squares_of_piece(piece: Tensor) -> Tensor:
    """Return the sum of squares of each norm block of `piece`, a slice of a parameter. The result is (blocks,) float64.
    Independent."""
    padded = piece.new_zeros(round_up(piece.numel(), NORM_BLOCK))
    padded[: piece.numel()].view(piece.shape).copy_(piece)
    return squares_of_blocks(padded)

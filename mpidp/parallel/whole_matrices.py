"""Gathers each matrix on one rank, for optimizers that compute the update of a whole matrix at once (Muon).

A rank updates boxes of matrices. A box is a rectangular block of a matrix. It is smaller than the matrix only with tensor
parallelism or mesh.shard=2|3. Every matrix has one owner among the ranks that hold a box of the matrix. The owner receives the
other boxes, computes the update, and sends each rank the update of its box. If several replicas hold a box, one of them sends
it, and all of them receive the update. Owners are chosen so that all ranks have about the same amount of computation. The
update of a matrix does not depend on its owner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.transport import Messages
from mpidp.comm.waiting import Wait, spin
from mpidp.errors import UsageError
from mpidp.parallel.model_part import ModelPartition

Range = tuple[int, int]  # [start, stop)
Matrix = list[Tensor]  # the tensors of one matrix or box, each (m, n) or (m, 1)
ROUND = 1 << 24  # elements per rank that are gathered at a time


@dataclass(frozen=True, order=True)
class Box:
    """A rectangular block of a matrix, given by ranges of rows and columns. name, shape: the name and the shape of the matrix
    in the whole model."""

    name: str
    shape: tuple[int, int]
    rows: Range
    columns: Range

    @property
    def size(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    def of(self, whole: Tensor) -> Tensor:
        """Return the elements of `whole`, (m, n), that are in this box. If `whole` is (m, 1), return the rows of this box.
        Pure."""
        rows = whole[self.rows[0] : self.rows[1]]
        return rows if whole.shape[1] == 1 else rows[:, self.columns[0] : self.columns[1]]


@dataclass(frozen=True)
class Hidden:
    """The matrices whose updates are functions of the whole matrix, and the ranks that compute these updates together."""

    names: frozenset[str] = frozenset()  # the names of these matrices in this rank's part of the model
    comm: MPI.Intracomm = field(default_factory=lambda: MPI.COMM_SELF)  # the ranks that compute updates at the same time
    transport: Messages = field(default_factory=lambda: Messages(torch.device("cpu")))
    wait: Wait = spin
    parts: ModelPartition | None = None

    def box(self, name: str, at: Sequence[int], size: Sequence[int], part: Sequence[int] | None = None) -> Box:
        """Convert a box of this rank's part of matrix `name` to a box of the matrix in the whole model. at: first row and first
        column of the box. size: numbers of rows and columns of the box. part: the shape of this rank's part (default: `size`).
        Pure."""
        if self.parts is None:
            shape, start = tuple(part or size), (0, 0)
        else:
            name = self.parts.part.global_name(name)
            shape = self.parts.sizes[name]
            start = tuple(one.start for one in self.parts.part.box(name, shape))
        low = [a + b for a, b in zip(start, at, strict=True)]
        rows, columns = ((a, a + length) for a, length in zip(low, size, strict=True))
        m, n = shape
        return Box(name, (m, n), rows, columns)


Move = tuple[int, int, Box]  # (sender, receiver, box)


@dataclass
class MatrixRound:
    """What this rank holds, sends and receives in one round. A round is a set of matrices that are gathered and updated at the
    same time. Every rank has a MatrixRound for each round, and the order of the rounds is the same on all ranks."""

    held: list[Box] = field(default_factory=list)  # this rank's boxes
    owned: list[tuple[str, tuple[int, int]]] = field(default_factory=list)  # name and shape of this rank's matrices
    local: dict[str, list[Box]] = field(default_factory=dict)  # this rank's boxes of the matrices that it owns
    gathers: list[Move] = field(default_factory=list)
    scatters: list[Move] = field(default_factory=list)


class WholeMatrices:
    """Applies functions to whole matrices whose boxes are on several ranks."""

    def __init__(self, hidden: Hidden, held: Sequence[Box], tensors: int = 1) -> None:
        """held: this rank's boxes. tensors: 1, or 2 if each matrix has a second tensor with one value per row. Raises UsageError
        if the ranks of hidden.comm together do not hold every element of a matrix. Collective over hidden.comm."""
        self._comm, self._transport, self._wait, self._tensors = hidden.comm, hidden.transport, hidden.wait, tensors
        every = self._comm.allgather(list(held)) if self._comm.size > 1 else [list(held)]
        holders: dict[tuple[str, tuple[int, int]], dict[Box, list[int]]] = {}
        for rank, boxes in enumerate(every):
            for box in boxes:
                holders.setdefault((box.name, box.shape), {}).setdefault(box, []).append(rank)
        load, self.rounds, filled = [0] * self._comm.size, [MatrixRound()], 0
        for (name, shape), boxes in sorted(holders.items(), key=lambda one: (-_cost(one[0][1]), one[0])):
            if sum(box.size[0] * box.size[1] for box in boxes) != shape[0] * shape[1]:
                raise UsageError(
                    f"the update of {name} needs the whole matrix, but its tensor-parallel ranks are on several nodes, and ranks "
                    "on different nodes do not update a matrix together. Use comm.copies=rank"
                )
            if filled + shape[0] * shape[1] > ROUND * self._comm.size and filled:
                self.rounds.append(MatrixRound())
                filled = 0
            filled += shape[0] * shape[1]
            owner = min(sorted({rank for ranks in boxes.values() for rank in ranks}), key=load.__getitem__)
            load[owner] += _cost(shape)
            self._plan(self.rounds[-1], owner, (name, shape), boxes)

    def _plan(self, now: MatrixRound, owner: int, matrix: tuple[str, tuple[int, int]], holders: Mapping[Box, list[int]]) -> None:
        me = self._comm.rank
        if owner == me:
            now.owned.append(matrix)
        for box, ranks in sorted(holders.items()):
            if me in ranks:
                now.held.append(box)
                if owner == me:
                    now.local.setdefault(box.name, []).append(box)
            if owner not in ranks:
                now.gathers.append((min(ranks, key=lambda rank: abs(rank - owner)), owner, box))
            now.scatters += [(owner, rank, box) for rank in ranks if rank != owner]

    def compute(
        self, now: MatrixRound, pieces: Mapping[Box, Matrix], work: Callable[[list[tuple[str, Matrix]]], list[Matrix]]
    ) -> dict[Box, Matrix]:
        """Apply `work` to the whole matrices of round `now`, an element of `rounds`. Return this rank's boxes of the results.
        pieces: the tensors of this rank's boxes. work: takes [(name, matrix), ...] and returns one result per matrix, in order.
        Collective over hidden.comm."""
        wholes = {name: self._assembled(now.local[name], shape, pieces) for name, shape in now.owned}

        def put(box: Box, found: Matrix) -> None:
            for whole, one in zip(wholes[box.name], found, strict=True):
                box.of(whole).copy_(one)

        self._exchange(now.gathers, lambda box: pieces[box], put)
        results = dict(zip(wholes, work(list(wholes.items())), strict=True))
        mine = {box: [box.of(one) for one in results[name]] for name, boxes in now.local.items() for box in boxes}

        def keep(box: Box, found: Matrix) -> None:
            mine[box] = [one.clone() for one in found]

        self._exchange(now.scatters, lambda box: [box.of(one) for one in results[box.name]], keep)
        return mine

    def _assembled(self, boxes: list[Box], shape: tuple[int, int], pieces: Mapping[Box, Matrix]) -> Matrix:
        """Return the tensors of a whole matrix with shape `shape`. Elements in `boxes` are copied from `pieces`, and all
        others are 0. If one box is the whole matrix, return its tensors without a copy."""
        own = pieces[boxes[0]]
        if boxes[0].size == shape:
            return own
        wholes = [one.new_zeros(shape[0], shape[1] if i == 0 else 1) for i, one in enumerate(own)]
        for box in boxes:
            for whole, one in zip(wholes, pieces[box], strict=True):
                box.of(whole).copy_(one)
        return wholes

    def _exchange(self, moves: list[Move], read: Callable[[Box], Matrix], write: Callable[[Box, Matrix], None]) -> None:
        """Send boxes between ranks in one exchange. moves: (source, target, box) of each box to send. All ranks pass the same
        list. read: returns the tensors of a box to send. write: stores the tensors of a received box. Collective over
        hidden.comm."""
        if not moves:
            return
        me, transport, ranks = self._comm.rank, self._transport, range(self._comm.size)
        sends = [[box for source, target, box in moves if source == me and target == rank] for rank in ranks]
        gets = [[box for source, target, box in moves if target == me and source == rank] for rank in ranks]

        def parts(boxes: list[Box]) -> list[tuple[int, int]]:
            return [size for box in boxes for size in (box.size, (box.size[0], 1))[: self._tensors]]

        lengths = [[sum(m * n for m, n in parts(boxes)) for boxes in one] for one in (sends, gets)]
        starts = [[0, *accumulate(one)][:-1] for one in lengths]
        out, arrived = (transport.scratch(("matrices", i), sum(one)) for i, one in enumerate(lengths))
        with transport.timed():
            values = [one for boxes in sends for box in boxes for one in read(box)]
            for place, one in zip(out.split([one.numel() for one in values]) if values else (), values, strict=True):
                place.view(one.shape).copy_(one)
            transport.ready()
            transport.alltoallv(self._comm, self._wait, (out, lengths[0], starts[0]), (arrived, lengths[1], starts[1]))
            transport.synchronize()
        boxes = [box for one in gets for box in one]
        sizes = parts(boxes)
        split = arrived.split([m * n for m, n in sizes]) if sizes else ()
        found = [one.view(size) for one, size in zip(split, sizes, strict=True)]
        for i, box in enumerate(boxes):
            write(box, found[i * self._tensors : (i + 1) * self._tensors])


def _cost(shape: tuple[int, int]) -> int:
    """Return a number proportional to the floating-point operations of a Newton-Schulz iteration on a matrix of this shape.
    Pure."""
    return shape[0] * shape[1] * min(shape)

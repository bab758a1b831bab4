"""The collectives themselves, over contiguous tensors on the host: which MPI calls, in pieces of which size.

Whoever calls whom must not depend on one rank's state: which MPI function is called follows from sizes, types and `blocking`,
which are the same on all ranks. Large messages go in pieces, because MPI's counts are ints and because reductions of
large messages make both MPIs allocate (comm/transport.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mpi4py import MPI

from mpidp.c10d.neighbours import Neighbours
from mpidp.c10d.sums import ADDED, DATATYPES, HALVES, average, fold, mpi_op
from mpidp.c10d.waiting import until
from mpidp.comm.buffers import memory
from mpidp.comm.transport import pieces

SMALL_BYTES = 1 << 16  # up to here a collective is polled for, whatever `blocking` says
NEAR_BYTES = 1 << 20  # from here on reading the others' memory is faster than messages; sooner for halves, which MPI cannot add
LARGEST_BYTES = 1 << 30  # of one call, all ranks' parts together


def octets(tensor: torch.Tensor) -> list[Any]:
    """The whole tensor as bytes. Independent."""
    return [memory(tensor), tensor.nbytes, MPI.BYTE]


def numbers(tensor: torch.Tensor) -> list[Any]:
    """The whole tensor as what MPI can add. Independent."""
    return [memory(tensor), tensor.numel(), DATATYPES[tensor.dtype]]


def parts(tensor: torch.Tensor, lengths: Sequence[int]) -> list[Any]:
    """The tensor in parts of these bytes, one a rank, one after another. Independent."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [memory(tensor), (list(lengths), starts), MPI.BYTE]


def private_tag(which: int) -> int:
    """Of messages that are not the user's. Pure."""
    return int(MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 0) - which


def send(comm: MPI.Intracomm, tensor: torch.Tensor, to: int, tag: int) -> list[MPI.Request]:
    """In as many messages as it takes. Independent."""
    flat = tensor.view(-1).view(torch.uint8)
    return [comm.Isend(octets(piece), to, tag) for piece in flat.split(LARGEST_BYTES)] if len(flat) else [
        comm.Isend(octets(flat), to, tag)
    ]


def take(comm: MPI.Intracomm, tensor: torch.Tensor, source: int, tag: int) -> list[MPI.Request]:
    """Independent."""
    flat = tensor.view(-1).view(torch.uint8)
    return [comm.Irecv(octets(piece), source, tag) for piece in flat.split(LARGEST_BYTES)] if len(flat) else [
        comm.Irecv(octets(flat), source, tag)
    ]


class Calls:
    """Over one communicator, by one thread at a time. Each method but `wait` is Collective over comm; tensors are contiguous,
    on the host; kind is a name of sums.OPS."""

    def __init__(self, comm: MPI.Intracomm, blocking: bool) -> None:
        """blocking: large reductions by MPI's blocking calls (up to 2.7 times as fast, Open MPI), which spin."""
        self.comm = comm
        self.blocking = blocking
        self.given_up: Callable[[], bool] = lambda: False
        self._space: dict[str, torch.Tensor] = {}
        self._neighbours: Neighbours | None = None
        self._asked = comm.size == 1  # is it settled whether there are any?

    def wait(self, request: MPI.Request) -> None:
        """Independent."""
        until(request, self.given_up)

    def scratch(self, name: str, like: torch.Tensor, elements: int) -> torch.Tensor:
        """A kept buffer, shape (elements,): fresh memory costs more than a sum. Independent."""
        held, needed = self._space.get(name), elements * like.element_size()
        if held is None or held.numel() < needed:
            held = self._space[name] = torch.empty(needed, dtype=torch.uint8)
        return held[:needed].view(like.dtype)

    def neighbours(self, added: torch.Tensor) -> Neighbours | None:
        """Where it pays and all ranks can read the others' memory, which the first large reduction settles."""
        if added.nbytes < (SMALL_BYTES if added.dtype in HALVES else NEAR_BYTES) or added.dtype not in ADDED:
            return None
        if not self._asked:
            found = Neighbours(self.tell, self.comm.rank, self.comm.size)
            self._neighbours = found if found.are_near() else None
            self._asked = True
        return self._neighbours

    def tell(self, numbers: list[int]) -> list[list[int]]:
        """All ranks' numbers; everybody has come."""
        table = torch.empty(self.comm.size, len(numbers), dtype=torch.int64)
        table[self.comm.rank] = torch.tensor(numbers)
        self.wait(self.comm.Iallgather(MPI.IN_PLACE, [memory(table), 8 * len(numbers), MPI.BYTE]))
        return table.tolist()

    def barrier(self) -> None:
        """Everybody has come."""
        self.wait(self.comm.Ibarrier())

    def bcast(self, tensor: torch.Tensor, root: int) -> None:
        """In place."""
        flat = tensor.view(-1)
        for begin, end in pieces(0, flat.numel(), flat.element_size()):
            self.wait(self.comm.Ibcast(octets(flat[begin:end]), root))

    def allreduce(self, tensor: torch.Tensor, kind: str) -> None:
        """In place."""
        flat = tensor.view(-1)
        if self.comm.size == 1:
            return
        if (near := self.neighbours(flat)) and near.allreduce(flat, kind):
            return
        for begin, end in pieces(0, flat.numel(), flat.element_size()):
            piece = flat[begin:end]
            if tensor.dtype not in DATATYPES:
                self._allreduce_by_hand(piece, kind)
            elif self.blocking and piece.nbytes > SMALL_BYTES:
                self.comm.Allreduce(MPI.IN_PLACE, numbers(piece), mpi_op(kind, tensor.dtype))
            else:
                self.wait(self.comm.Iallreduce(MPI.IN_PLACE, numbers(piece), mpi_op(kind, tensor.dtype)))
        if kind == "AVG" and tensor.dtype in DATATYPES:
            average(flat, self.comm.size)

    def _allreduce_by_hand(self, piece: torch.Tensor, kind: str) -> None:
        """Each rank adds its share of all ranks' values, in float32, and hands it round."""
        ranks, length = self.comm.size, piece.numel()
        share = -(-length // ranks)
        padded = self.scratch("padded", piece, share * ranks)
        padded[:length].copy_(piece)
        padded[length:].zero_()
        mine = self.scratch("mine", piece, share)
        self._reduce_scatter_by_hand(padded, mine, kind)
        self.allgather(mine, padded)
        piece.copy_(padded[:length])

    def _reduce_scatter_by_hand(self, source: torch.Tensor, target: torch.Tensor, kind: str) -> None:
        got = self.scratch("got", source, source.numel())
        self.alltoall(source, got, [target.nbytes] * self.comm.size, [target.nbytes] * self.comm.size)
        fold(got.view(self.comm.size, -1), kind, target.view(-1))

    def reduce(self, tensor: torch.Tensor, kind: str, root: int) -> None:
        """In place at the root; elsewhere the tensor keeps its values."""
        flat = tensor.view(-1)
        if self.comm.size > 1 and tensor.dtype not in DATATYPES:
            whole = flat if self.comm.rank == root else flat.clone()
            self.allreduce(whole, kind)
            return
        for begin, end in pieces(0, flat.numel() if self.comm.size > 1 else 0, flat.element_size()):
            piece, op = numbers(flat[begin:end]), mpi_op(kind, tensor.dtype)
            if self.comm.rank == root:
                self.wait(self.comm.Ireduce(MPI.IN_PLACE, piece, op, root))
            else:
                self.wait(self.comm.Ireduce(piece, None, op, root))
        if kind == "AVG" and self.comm.rank == root and tensor.dtype in DATATYPES:
            average(flat, self.comm.size)

    def reduce_scatter(self, source: torch.Tensor, target: torch.Tensor, kind: str) -> None:
        """source (ranks x n) reduced; rank r has the r-th run of n in target. They may overlap."""
        ranks, rows, out = self.comm.size, source.view(self.comm.size, -1), target.view(-1)
        if near := self.neighbours(source):
            result = self.scratch("kept", source, out.numel()) if overlap(source, target) else out
            if near.reduce_scatter(rows, result, kind):
                if result is not out:
                    out.copy_(result)
                return
        for begin, end in pieces(0, out.numel(), out.element_size() * ranks):
            piece, got = self.scratch("piece", source, ranks * (end - begin)), self.scratch("sum", source, end - begin)
            piece.view(ranks, -1).copy_(rows[:, begin:end])
            if ranks == 1:
                got.copy_(piece)
            elif source.dtype not in DATATYPES:
                self._reduce_scatter_by_hand(piece, got, kind)
            else:
                self._reduce_scatter(piece, got, mpi_op(kind, source.dtype))
            if overlap(source, target):  # later pieces are still to be read
                self.scratch("kept", source, out.numel())[begin:end].copy_(got)
            else:
                out[begin:end].copy_(got)
        if out.numel() and overlap(source, target):
            out.copy_(self.scratch("kept", source, out.numel()))
        if kind == "AVG" and ranks > 1 and source.dtype in DATATYPES:
            average(out, ranks)

    def _reduce_scatter(self, piece: torch.Tensor, got: torch.Tensor, op: MPI.Op) -> None:
        source = [memory(piece), got.numel(), DATATYPES[piece.dtype]]
        if self.blocking and piece.nbytes > SMALL_BYTES:
            self.comm.Reduce_scatter_block(source, numbers(got), op)
        else:
            self.wait(self.comm.Ireduce_scatter_block(source, numbers(got), op))

    def allgather(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """target (ranks x n) = each rank's source (n), which may lie in the target."""
        ranks, flat, rows = self.comm.size, source.view(-1), target.view(self.comm.size, -1)
        if target.nbytes <= LARGEST_BYTES:
            mine = rows[self.comm.rank]
            if flat.data_ptr() != mine.data_ptr():
                mine.copy_(flat.clone() if overlap(source, target) else flat)
            self.wait(self.comm.Iallgather(MPI.IN_PLACE, [memory(target), source.nbytes, MPI.BYTE]))
            return
        flat = flat.clone() if overlap(source, target) else flat
        for begin, end in pieces(0, flat.numel(), flat.element_size()):
            got = self.scratch("rows", source, ranks * (end - begin))
            self.wait(self.comm.Iallgather(octets(flat[begin:end]), [memory(got), flat[begin:end].nbytes, MPI.BYTE]))
            rows[:, begin:end].copy_(got.view(ranks, -1))

    def allgatherv(self, source: torch.Tensor, target: torch.Tensor, lengths: Sequence[int]) -> None:
        """target = all ranks' sources one after another, of these bytes."""
        if target.nbytes <= LARGEST_BYTES:
            self.wait(self.comm.Iallgatherv(octets(source), parts(target, lengths)))
            return
        for rank, part in enumerate(target.view(-1).view(torch.uint8).split(list(lengths))):
            if rank == self.comm.rank:
                part.copy_(source.view(-1).view(torch.uint8))
            self.bcast(part, rank)

    def gather(self, source: torch.Tensor, target: torch.Tensor | None, root: int) -> None:
        """target (ranks x n), at the root alone, = each rank's source (n)."""
        flat = source.view(-1)
        for begin, end in pieces(0, flat.numel(), flat.element_size() * self.comm.size):
            piece = octets(flat[begin:end])
            if target is None:
                self.wait(self.comm.Igather(piece, None, root))
                continue
            got = self.scratch("rows", source, self.comm.size * (end - begin))
            self.wait(self.comm.Igather(piece, [memory(got), flat[begin:end].nbytes, MPI.BYTE], root))
            target.view(self.comm.size, -1)[:, begin:end].copy_(got.view(self.comm.size, -1))

    def scatter(self, source: torch.Tensor | None, target: torch.Tensor, root: int) -> None:
        """target (n) = this rank's run of the root's source (ranks x n)."""
        flat = target.view(-1)
        for begin, end in pieces(0, flat.numel(), flat.element_size() * self.comm.size):
            piece = flat[begin:end]
            if source is None:
                self.wait(self.comm.Iscatter(None, octets(piece), root))
                continue
            sent = self.scratch("rows", target, self.comm.size * (end - begin))
            sent.view(self.comm.size, -1).copy_(source.view(self.comm.size, -1)[:, begin:end])
            self.wait(self.comm.Iscatter([memory(sent), piece.nbytes, MPI.BYTE], octets(piece), root))

    def alltoall(self, source: torch.Tensor, target: torch.Tensor, sent: Sequence[int], taken: Sequence[int]) -> None:
        """Each rank's parts of the source to the others; sent, taken: bytes to and from each rank, one part after another."""
        most = LARGEST_BYTES // self.comm.size
        if max(*sent, *taken) <= most:
            self.wait(self.comm.Ialltoallv(parts(source, sent), parts(target, taken)))
            return
        outgoing = source.view(-1).view(torch.uint8).split(list(sent))  # both ends of a pair know that its part is large
        incoming = target.view(-1).view(torch.uint8).split(list(taken))
        packed = torch.cat([part for part in outgoing if len(part) <= most] or [source.new_empty(0, dtype=torch.uint8)])
        short_sent, short_taken = ([n if n <= most else 0 for n in lengths] for lengths in (sent, taken))
        got = torch.empty(sum(short_taken), dtype=torch.uint8)
        requests = [self.comm.Ialltoallv(parts(packed, short_sent), parts(got, short_taken))]
        for rank in range(self.comm.size):
            requests += take(self.comm, incoming[rank], rank, private_tag(1)) if taken[rank] > most else []
        for rank in range(self.comm.size):
            requests += send(self.comm, outgoing[rank], rank, private_tag(1)) if sent[rank] > most else []
        for request in requests:
            self.wait(request)
        for part, new in zip(incoming, got.split(short_taken), strict=True):
            part[: len(new)].copy_(new)

    def sparse_allreduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of COO tensors: all ranks' entries, those at one place added."""
        tensor = tensor.coalesce()
        counts = torch.zeros(self.comm.size, dtype=torch.int64)
        self.allgather(torch.tensor([tensor._nnz()], dtype=torch.int64), counts)
        entries = counts.tolist()
        indices, values = tensor.indices().t().contiguous(), tensor.values().contiguous()
        every = torch.empty((sum(entries), *indices.shape[1:]), dtype=indices.dtype)
        total = torch.empty((sum(entries), *values.shape[1:]), dtype=values.dtype)
        for mine, whole in ((indices, every), (values, total)):
            row = mine[0].nbytes if len(mine) else whole[0].nbytes if len(whole) else 0
            self.allgatherv(mine, whole, [n * row for n in entries])
        return torch.sparse_coo_tensor(every.t(), total, tensor.shape).coalesce()


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Do two contiguous tensors share memory? Pure."""
    a, b = one.data_ptr(), other.data_ptr()
    return a < b + other.nbytes and b < a + one.nbytes

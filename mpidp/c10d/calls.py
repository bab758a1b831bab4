"""Collectives over contiguous host tensors. This module chooses the MPI functions and splits large tensors.

All ranks must call the same MPI functions. The choice therefore depends only on sizes, dtypes and `blocking`, which are the same
on all ranks. Large messages are split because MPI counts are 32-bit integers, and because MPICH and Open MPI allocate new memory
to reduce large messages (comm/transport.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mpi4py import MPI

from mpidp.c10d.shared_memory import SharedMemory
from mpidp.c10d.sums import ADDED, DATATYPES, HALVES, average, fold, mpi_op
from mpidp.c10d.waiting import wait_for
from mpidp.comm.buffers import memory
from mpidp.comm.transport import pieces

SMALL_BYTES = 1 << 16  # smaller collectives always poll, even with blocking=True
NEAR_BYTES = 1 << 20  # smallest tensor that uses shared memory; for half-precision reductions, the limit is SMALL_BYTES
LARGEST_BYTES = 1 << 30  # largest total size of all ranks' data in one MPI call


def octets(tensor: torch.Tensor) -> list[Any]:
    """Return an mpi4py buffer that describes the whole tensor as bytes. Independent."""
    return [memory(tensor), tensor.nbytes, MPI.BYTE]


def numbers(tensor: torch.Tensor) -> list[Any]:
    """Return an mpi4py buffer that describes the whole tensor as numbers, which MPI can reduce. Independent."""
    return [memory(tensor), tensor.numel(), DATATYPES[tensor.dtype]]


def parts(tensor: torch.Tensor, lengths: Sequence[int]) -> list[Any]:
    """Return an mpi4py buffer that divides the tensor into one range per rank. `lengths`: bytes of each range. Independent."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [memory(tensor), (list(lengths), starts), MPI.BYTE]


def private_tag(which: int) -> int:
    """Return a tag for internal messages: the largest tag that MPI allows, minus `which`. Pure."""
    return int(MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 0) - which


def send(comm: MPI.Intracomm, tensor: torch.Tensor, to: int, tag: int) -> list[MPI.Request]:
    """Start sending a tensor in pieces of at most LARGEST_BYTES, and return the requests. Independent."""
    flat = tensor.view(-1).view(torch.uint8)
    return [comm.Isend(octets(piece), to, tag) for piece in flat.split(LARGEST_BYTES)] if len(flat) else [
        comm.Isend(octets(flat), to, tag)
    ]


def receive(comm: MPI.Intracomm, tensor: torch.Tensor, source: int, tag: int) -> list[MPI.Request]:
    """Start receiving a tensor in the pieces that send() uses, and return the requests. Independent."""
    flat = tensor.view(-1).view(torch.uint8)
    return [comm.Irecv(octets(piece), source, tag) for piece in flat.split(LARGEST_BYTES)] if len(flat) else [
        comm.Irecv(octets(flat), source, tag)
    ]


class Calls:
    """The collectives of one communicator. Only one thread at a time may use the object. Methods are Collective over comm unless
    their docstrings say Independent.

    Tensors must be contiguous and on the host. The parameter `kind` is the name of the reduction, a key of sums.OPS.
    """

    def __init__(self, comm: MPI.Intracomm, blocking: bool) -> None:
        """`blocking`: whether to use MPI's blocking calls for large reductions. With Open MPI, blocking calls are up to 2.7 times
        as fast as non-blocking calls, but a rank that waits in one keeps its core busy."""
        self.comm = comm
        self.blocking = blocking
        self.aborted: Callable[[], bool] = lambda: False
        self._space: dict[str, torch.Tensor] = {}
        self._shared: SharedMemory | None = None
        self._searched = comm.size == 1  # whether shared memory has been tried

    def wait(self, request: MPI.Request) -> None:
        """Wait for a request. Raises Aborted if the group is aborted before the request completes. Independent."""
        wait_for(request, self.aborted)

    def scratch(self, name: str, like: torch.Tensor, elements: int) -> torch.Tensor:
        """Return a buffer of shape (elements,) with the dtype of `like`. The next call with the same name returns the same
        memory. This is faster than allocating memory for each reduction. Independent."""
        buffer, needed = self._space.get(name), elements * like.element_size()
        if buffer is None or buffer.numel() < needed:
            buffer = self._space[name] = torch.empty(needed, dtype=torch.uint8)
        return buffer[:needed].view(like.dtype)

    def shared_memory(self, tensor: torch.Tensor, reduced: bool = False) -> SharedMemory | None:
        """Return the object that runs collectives in shared memory, or None if this tensor must be sent in messages. The first
        call for a large tensor tries to share memory. `reduced`: whether the collective is a reduction."""
        least = SMALL_BYTES if reduced and tensor.dtype in HALVES else NEAR_BYTES
        if tensor.nbytes < least or (reduced and tensor.dtype not in ADDED):
            return None
        if not self._searched:
            found = SharedMemory(self.exchange, self.barrier, self.comm.rank, self.comm.size)
            self._shared = found if found.open() else None
            self._searched = True
        return self._shared

    def exchange(self, numbers: list[int]) -> list[list[int]]:
        """Return the lists `numbers` of all ranks, in order of ranks. The call also synchronizes the ranks."""
        table = torch.empty(self.comm.size, len(numbers), dtype=torch.int64)
        table[self.comm.rank] = torch.tensor(numbers)
        self.wait(self.comm.Iallgather(MPI.IN_PLACE, [memory(table), 8 * len(numbers), MPI.BYTE]))
        return table.tolist()

    def barrier(self) -> None:
        """Wait until all ranks have called barrier()."""
        self.wait(self.comm.Ibarrier())

    def bcast(self, tensor: torch.Tensor, root: int) -> None:
        """Copy the tensor of rank `root` into the tensors of the other ranks."""
        flat = tensor.view(-1)
        if shared := self.shared_memory(flat):
            shared.bcast(flat.view(torch.uint8), root)
            return
        for begin, end in pieces(0, flat.numel(), flat.element_size()):
            self.wait(self.comm.Ibcast(octets(flat[begin:end]), root))

    def allreduce(self, tensor: torch.Tensor, kind: str) -> None:
        """Reduce the tensor over all ranks. The result replaces the tensor on every rank."""
        flat = tensor.view(-1)
        if self.comm.size == 1:
            return
        if shared := self.shared_memory(flat, reduced=True):
            shared.allreduce(flat, kind)
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
        """Reduce a tensor whose dtype MPI cannot reduce, in place. Each rank reduces one range in float32. Then all ranks
        gather the ranges."""
        ranks, length = self.comm.size, piece.numel()
        share = -(-length // ranks)
        padded = self.scratch("padded", piece, share * ranks)
        padded[:length].copy_(piece)
        padded[length:].zero_()
        reduced = self.scratch("reduced", piece, share)
        self._reduce_scatter_by_hand(padded, reduced, kind)
        self.allgather(reduced, padded)
        piece.copy_(padded[:length])

    def _reduce_scatter_by_hand(self, source: torch.Tensor, target: torch.Tensor, kind: str) -> None:
        got = self.scratch("got", source, source.numel())
        self.alltoall(source, got, [target.nbytes] * self.comm.size, [target.nbytes] * self.comm.size)
        fold(got.view(self.comm.size, -1), kind, target.view(-1))

    def reduce(self, tensor: torch.Tensor, kind: str, root: int) -> None:
        """Reduce the tensor over all ranks, and store the result in the tensor of rank `root`. Other ranks' tensors are
        unchanged."""
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
        """Reduce `source` (ranks, n) over all ranks. Rank r stores row r of the result in `target` (n,), which may overlap
        `source`."""
        ranks, rows, out = self.comm.size, source.view(self.comm.size, -1), target.view(-1)
        if shared := self.shared_memory(source, reduced=True):
            result = self.scratch("kept", source, out.numel()) if overlap(source, target) else out
            shared.reduce_scatter(rows, result, kind)
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
            if overlap(source, target):  # writing to target now would overwrite later pieces of source
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
        """Copy the `source` (n,) of rank r into row r of every rank's `target` (ranks, n). `source` may be a view of `target`."""
        ranks, flat, rows = self.comm.size, source.view(-1), target.view(self.comm.size, -1)
        shared = self.shared_memory(target)
        if shared or target.nbytes <= LARGEST_BYTES:
            own = rows[self.comm.rank]
            if flat.data_ptr() != own.data_ptr():
                own.copy_(flat.clone() if overlap(source, target) else flat)
            if shared:
                shared.allgather(rows.view(torch.uint8))
                return
            self.wait(self.comm.Iallgather(MPI.IN_PLACE, [memory(target), source.nbytes, MPI.BYTE]))
            return
        flat = flat.clone() if overlap(source, target) else flat
        for begin, end in pieces(0, flat.numel(), flat.element_size()):
            got = self.scratch("rows", source, ranks * (end - begin))
            self.wait(self.comm.Iallgather(octets(flat[begin:end]), [memory(got), flat[begin:end].nbytes, MPI.BYTE]))
            rows[:, begin:end].copy_(got.view(ranks, -1))

    def allgatherv(self, source: torch.Tensor, target: torch.Tensor, lengths: Sequence[int]) -> None:
        """Concatenate the `source` tensors of all ranks in every rank's `target`. `lengths`: bytes of each rank's `source`."""
        if target.nbytes <= LARGEST_BYTES:
            self.wait(self.comm.Iallgatherv(octets(source), parts(target, lengths)))
            return
        for rank, part in enumerate(target.view(-1).view(torch.uint8).split(list(lengths))):
            if rank == self.comm.rank:
                part.copy_(source.view(-1).view(torch.uint8))
            self.bcast(part, rank)

    def gather(self, source: torch.Tensor, target: torch.Tensor | None, root: int) -> None:
        """Copy the `source` (n,) of rank r into row r of `target` (ranks, n) on rank `root`. On other ranks, `target` is None."""
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
        """Copy row r of `source` (ranks, n) on rank `root` into `target` (n,) of rank r. On other ranks, `source` is None."""
        flat = target.view(-1)
        for begin, end in pieces(0, flat.numel(), flat.element_size() * self.comm.size):
            piece = flat[begin:end]
            if source is None:
                self.wait(self.comm.Iscatter(None, octets(piece), root))
                continue
            sent = self.scratch("rows", target, self.comm.size * (end - begin))
            sent.view(self.comm.size, -1).copy_(source.view(self.comm.size, -1)[:, begin:end])
            self.wait(self.comm.Iscatter([memory(sent), piece.nbytes, MPI.BYTE], octets(piece), root))

    def alltoall(self, source: torch.Tensor, target: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> None:
        """Send range r of `source` to rank r, for every r. Store the received ranges in `target`, in order of their senders.

        `sent`: the bytes of each range of `source`. `received`: the bytes of each range of `target`.
        """
        most = LARGEST_BYTES // self.comm.size
        if max(*sent, *received) <= most:
            self.wait(self.comm.Ialltoallv(parts(source, sent), parts(target, received)))
            return
        outgoing = source.view(-1).view(torch.uint8).split(list(sent))  # sender and receiver know the length of each range
        incoming = target.view(-1).view(torch.uint8).split(list(received))
        packed = torch.cat([part for part in outgoing if len(part) <= most] or [source.new_empty(0, dtype=torch.uint8)])
        short_sent, short_taken = ([n if n <= most else 0 for n in lengths] for lengths in (sent, received))
        got = torch.empty(sum(short_taken), dtype=torch.uint8)
        requests = [self.comm.Ialltoallv(parts(packed, short_sent), parts(got, short_taken))]
        for rank in range(self.comm.size):
            requests += receive(self.comm, incoming[rank], rank, private_tag(1)) if received[rank] > most else []
        for rank in range(self.comm.size):
            requests += send(self.comm, outgoing[rank], rank, private_tag(1)) if sent[rank] > most else []
        for request in requests:
            self.wait(request)
        for part, new in zip(incoming, got.split(short_taken), strict=True):
            part[: len(new)].copy_(new)

    def sparse_allreduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of the sparse COO tensors of all ranks. Entries with equal indices are added."""
        tensor = tensor.coalesce()
        counts = torch.zeros(self.comm.size, dtype=torch.int64)
        self.allgather(torch.tensor([tensor._nnz()], dtype=torch.int64), counts)
        entries = counts.tolist()
        indices, values = tensor.indices().t().contiguous(), tensor.values().contiguous()
        every = torch.empty((sum(entries), *indices.shape[1:]), dtype=indices.dtype)
        total = torch.empty((sum(entries), *values.shape[1:]), dtype=values.dtype)
        for local, whole in ((indices, every), (values, total)):
            row = local[0].nbytes if len(local) else whole[0].nbytes if len(whole) else 0
            self.allgatherv(local, whole, [n * row for n in entries])
        return torch.sparse_coo_tensor(every.t(), total, tensor.shape).coalesce()


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two contiguous tensors share memory. Pure."""
    a, b = one.data_ptr(), other.data_ptr()
    return a < b + other.nbytes and b < a + one.nbytes

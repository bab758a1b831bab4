"""Large collectives within a node. They use buffers in shared memory instead of MPI messages.

A tensor passes through the buffers in pieces that fit in the processor's cache. An all_reduce has three phases for each piece.
First, every rank copies the piece to its own buffer. Second, every rank reduces one range of all ranks' buffers, and stores the
result in a common buffer. Third, every rank copies the reduced piece from the common buffer. Each buffer has two halves, so that
successive pieces can be in different phases at the same time. The ranks therefore synchronize only once per piece.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Callable

import torch

from mpidp.c10d.sums import ADDERS, HALVES, average

BUFFER_BYTES = 1 << 26  # largest total size of all ranks' buffers for one piece
PIECE_BYTES = 1 << 22  # largest piece of one rank
ALIGN = 64  # each rank's range starts at a multiple of this many elements
NEAR = "MPIDP_C10D_NEAR"  # if this variable is "messages" on any rank, no collective uses shared memory
TOKEN = 2  # number of random integers that identify a buffer
Exchange = Callable[[list[int]], list[list[int]]]  # gathers every rank's list of numbers on all ranks
Phase = Callable[[int], None]  # a function that processes the piece with the given index


def _made(size: int) -> tuple[int, list[int]]:
    """Make an anonymous file of `size` bytes that begins with random integers. Return (descriptor, integers). The descriptor is
    -1 if the system cannot make the file, for example because the process cannot open more files."""
    token = torch.frombuffer(bytearray(os.urandom(8 * TOKEN)), dtype=torch.int64)
    handle = -1
    try:
        handle = os.memfd_create("mpidp")
        os.truncate(handle, size)
        os.pwrite(handle, token.numpy().tobytes(), 0)
    except (AttributeError, OSError):  # this system has no memfd_create, or refuses another file of this size
        if handle >= 0:
            os.close(handle)
        handle = -1
    return handle, token.tolist()


class SharedMemory:
    """Collectives of a group whose ranks all run on one node. Public methods are Collective over the group.

    Tensors must be contiguous and on the host. For reductions, their dtype must be in sums.ADDED. The parameter `kind` is the
    name of the reduction, a key of sums.OPS. Methods raise RuntimeError on all ranks if the ranks call different methods, or
    pass different sizes or dtypes.
    """

    def __init__(self, exchange: Exchange, synchronize: Callable[[], None], rank: int, ranks: int) -> None:
        """`exchange`: a function that gathers a list of numbers from every rank of the group. `synchronize`: a barrier over the
        group."""
        self.rank, self.ranks = rank, ranks
        self._exchange, self._synchronize = exchange, synchronize
        self._piece = max(ALIGN * 8, min(PIECE_BYTES, BUFFER_BYTES // ranks) // (ALIGN * 8) * (ALIGN * 8))
        self._wide = torch.empty(self._piece // 2)  # float32 sums of half-precision values
        self._halves: torch.Tensor = torch.empty(0)  # (2, ranks + 1, bytes): each rank's buffer, and the common buffer

    def open(self) -> bool:
        """Map the buffers, and return True. Return False on all ranks if the ranks do not share a node, or if the system
        cannot share memory."""
        size, handle, token = 2 * (self.ranks + 1) * self._piece, -1, [0] * TOKEN
        if self.rank == 0 and os.environ.get(NEAR) != "messages":
            handle, token = _made(size)
        pid, number, *token = self._exchange([os.getpid(), handle, *token])[0]
        mapped = number >= 0 and os.environ.get(NEAR) != "messages" and self._map(f"/proc/{pid}/fd/{number}", size, token)
        every = all(row[0] for row in self._exchange([int(mapped)]))
        if handle >= 0:
            os.close(handle)
        return every

    def _map(self, path: str, size: int, token: list[int]) -> bool:
        """Map the file of rank 0. Return False if this is not possible, for example because rank 0 is on another node. The random
        integers `token` show whether the file at `path` is the one that rank 0 made."""
        try:
            handle = os.open(path, os.O_RDWR)
        except OSError:
            return False
        try:
            if os.fstat(handle).st_size != size or os.pread(handle, 8 * TOKEN, 0) != torch.tensor(token).numpy().tobytes():
                return False
            self._halves = torch.frombuffer(mmap.mmap(handle, size), dtype=torch.uint8).view(2, self.ranks + 1, self._piece)
            return True
        except OSError:
            return False
        finally:
            os.close(handle)

    def _begin(self, tensor: torch.Tensor, call: str) -> None:
        """Wait until all ranks have begun this call, so that the previous call no longer uses the buffers. Raises RuntimeError
        if the ranks make different calls."""
        table = self._exchange([tensor.nbytes, zlib.crc32(f"{call} {tensor.dtype}".encode())])
        for rank, found in enumerate(table):
            if found != table[0]:
                raise RuntimeError(
                    f"mpi4py: the ranks do not agree in {call}: rank {rank} has {found[0]} bytes and rank 0 has {table[0][0]} "
                    "bytes"
                    + (", and their collectives, dtypes or reductions differ" if found[1] != table[0][1] else "")
                )

    def _run(self, count: int, *phases: Phase) -> None:
        """Run all phases on each of `count` pieces. A piece enters a phase after all ranks have finished the previous phase of
        this piece."""
        turns = count + len(phases) - 1
        for turn in range(turns if count else 0):
            for place, phase in enumerate(phases):
                if 0 <= turn - place < count:
                    phase(turn - place)
            if turn < turns - 1:
                self._synchronize()

    def _buffers(self, k: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the buffers for piece `k`, as a tensor (ranks + 1, elements). The last row is the common buffer."""
        return self._halves[k % 2].view(dtype)

    def _reduce(self, sources: list[torch.Tensor], kind: str, out: torch.Tensor) -> None:
        """Reduce the sources into `out`, in order of ranks. Half-precision values are reduced in float32, and the result is
        rounded once."""
        add, half = ADDERS[kind], out.dtype in HALVES
        total = self._wide[: len(out)].copy_(sources[0]) if half else sources[0]
        for source in sources[1:]:
            total = add(total, source, out=total if half else out)
        if kind == "AVG":
            average(total, self.ranks)
        if half:
            out.copy_(total)

    def allreduce(self, flat: torch.Tensor, kind: str) -> None:
        """Reduce `flat` (n,) over all ranks. The result replaces `flat` on every rank."""
        self._begin(flat, f"all_reduce {kind}")
        step, rank = self._piece // flat.element_size(), self.rank
        pieces = flat.split(step) if len(flat) else ()

        def bounds(piece: torch.Tensor) -> tuple[int, int]:
            share = -(-len(piece) // (self.ranks * ALIGN)) * ALIGN
            return min(rank * share, len(piece)), min((rank + 1) * share, len(piece))

        def copy_in(k: int) -> None:  # skips this rank's own range, which no other rank reads
            (low, high), buffer = bounds(pieces[k]), self._buffers(k, flat.dtype)[rank, : len(pieces[k])]
            buffer[:low].copy_(pieces[k][:low])
            buffer[high:].copy_(pieces[k][high:])

        def reduce(k: int) -> None:
            (low, high), buffers = bounds(pieces[k]), self._buffers(k, flat.dtype)
            sources = [pieces[k][low:high] if r == rank else buffers[r, low:high] for r in range(self.ranks)]
            self._reduce(sources, kind, buffers[-1, low:high])

        self._run(len(pieces), copy_in, reduce, lambda k: pieces[k].copy_(self._buffers(k, flat.dtype)[-1, : len(pieces[k])]))

    def reduce_scatter(self, rows: torch.Tensor, out: torch.Tensor, kind: str) -> None:
        """Reduce `rows` (ranks, n) over all ranks. Rank r stores row r of the result in its `out` (n,), which must not overlap
        `rows`."""
        self._begin(rows, f"reduce_scatter {kind}")
        step = self._piece // self.ranks // ALIGN * ALIGN // rows.element_size() or 1

        def columns(k: int) -> tuple[torch.Tensor, torch.Tensor]:
            piece = rows[:, k * step : (k + 1) * step]
            return piece, self._buffers(k, rows.dtype)[:, : piece.numel()].view(self.ranks + 1, *piece.shape)

        def copy_in(k: int) -> None:
            piece, buffers = columns(k)
            buffers[self.rank, : self.rank].copy_(piece[: self.rank])
            buffers[self.rank, self.rank + 1 :].copy_(piece[self.rank + 1 :])

        def reduce(k: int) -> None:
            piece, buffers = columns(k)
            sources = [piece[r] if r == self.rank else buffers[r, self.rank] for r in range(self.ranks)]
            self._reduce(sources, kind, out[k * step : (k + 1) * step])

        self._run(-(-len(out) // step), copy_in, reduce)

    def allgather(self, rows: torch.Tensor) -> None:
        """Copy row r of `rows` (ranks, n) from rank r to all other ranks, for every r."""
        self._begin(rows, "all_gather")
        step = self._piece // rows.element_size()
        pieces = [rows[:, begin : begin + step] for begin in range(0, rows.shape[1], step)]

        def copy_in(k: int) -> None:
            self._buffers(k, rows.dtype)[self.rank, : pieces[k].shape[1]].copy_(pieces[k][self.rank])

        def copy_out(k: int) -> None:
            for r in range(self.ranks):
                if r != self.rank:
                    pieces[k][r].copy_(self._buffers(k, rows.dtype)[r, : pieces[k].shape[1]])

        self._run(len(pieces), copy_in, copy_out)

    def bcast(self, flat: torch.Tensor, root: int) -> None:
        """Copy `flat` (n,) from rank `root` to all other ranks."""
        self._begin(flat, f"broadcast from rank {root}")
        pieces = flat.split(self._piece // flat.element_size()) if len(flat) else ()

        def copy(k: int, into: bool) -> None:
            common = self._buffers(k, flat.dtype)[-1, : len(pieces[k])]
            if (self.rank == root) == into:
                (common if into else pieces[k]).copy_(pieces[k] if into else common)

        self._run(len(pieces), lambda k: copy(k, True), lambda k: copy(k, False))

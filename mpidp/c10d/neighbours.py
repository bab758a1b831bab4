"""Large reductions of ranks on one node without messages: a rank reads the others' tensors where they lie, by one copy of the
operating system's (Linux: process_vm_readv), and adds its own slice.

The ranks meet at the beginning, where they tell their tensors' addresses, between adding and handing round, and at the end:
nobody's tensor may change while others read it. A window of shared memory was slower (docs/results/2026-11-27-c10d.md): each
value is copied once more, and the ranks meet at each piece. Here there is no memory to make, to free or to find too small.
"""

from __future__ import annotations

import ctypes
import errno
import os
import zlib
from collections.abc import Callable
from typing import Any

import torch

from mpidp.c10d.sums import ADDERS, HALVES, average

BLOCK_BYTES = 1 << 19  # read and added at a time: it stays in a core's cache
READ_BYTES = 1 << 26  # of one copy: the operating system's own limit is 2 GiB
ALIGN = 64  # elements, at which slices are cut
HOW = "MPIDP_C10D_NEAR"  # messages: large reductions go as those between nodes do; on a rank it is enough
ALLOW, ANYBODY = 0x59616D61, ctypes.c_ulong(-1)  # prctl's PR_SET_PTRACER, of the Yama module
TOKEN = 2  # numbers
FOUND, REFUSED, NEVER = range(3)
Tell = Callable[[list[int]], list[list[int]]]  # numbers of this rank -> of all ranks


class _Vector(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _reader() -> Any:
    """The C function; None where there is none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if function is not None:
        function.restype = ctypes.c_ssize_t
        vector = ctypes.POINTER(_Vector)
        function.argtypes = (ctypes.c_int, vector, ctypes.c_ulong, vector, ctypes.c_ulong, ctypes.c_ulong)
    return function


class Neighbours:
    """Of one group. Public methods are Collective over it; tensors are flat, contiguous and on the host, of sums.ADDED; kind is a
    name of sums.OPS. RuntimeError on all ranks where they do not call the same, or memory cannot be read after all."""

    def __init__(self, tell: Tell, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self._tell = tell
        self._function = _reader()
        self._failed = ""
        self._blocks = torch.empty(2, BLOCK_BYTES, dtype=torch.uint8)  # of other ranks; a sum grows in the first
        self._wide = torch.empty(BLOCK_BYTES // 2)  # of halves
        self._pids: list[int] = []

    def are_near(self) -> bool:
        """May all ranks read all others' memory? Where only permission is missing (the Yama module's ptrace_scope 1), each gives
        it, as MPI libraries do, and they try again."""
        token = torch.frombuffer(bytearray(os.urandom(8 * TOKEN)), dtype=torch.int64)
        table = self._tell([os.getpid(), token.data_ptr(), *token.tolist()])
        self._pids = [row[0] for row in table]
        for _ in range(2):
            worst = max(self._finds(rank, table[rank]) for rank in range(self.ranks))
            worst = max(row[0] for row in self._tell([worst]))
            if worst != REFUSED:
                break
            ctypes.CDLL(None).prctl(ALLOW, ANYBODY, 0, 0, 0)
        return worst == FOUND

    def _finds(self, rank: int, row: list[int]) -> int:
        """Is this other process the one that said so? One of another node may have its number."""
        if self._function is None or os.environ.get(HOW) == "messages":
            return NEVER
        found = torch.zeros(TOKEN, dtype=torch.int64)
        self._read(rank, row[1], found)
        failed, self._failed = self._failed, ""
        if failed:
            return REFUSED if ctypes.get_errno() == errno.EPERM else NEVER
        return FOUND if found.tolist() == row[2:] else NEVER

    def _read(self, rank: int, address: int, into: torch.Tensor) -> None:
        """What fails is told at the next meeting."""
        for begin in range(0, into.nbytes, READ_BYTES):
            length = min(READ_BYTES, into.nbytes - begin)
            here, there = _Vector(into.data_ptr() + begin, length), _Vector(address + begin, length)
            if self._function(self._pids[rank], here, 1, there, 1, 0) != length:
                self._failed = self._failed or f"rank {rank}'s memory: {os.strerror(ctypes.get_errno())}"

    def _begin(self, tensor: torch.Tensor, what: str) -> list[int] | None:
        """Everybody's address; None on all ranks where one of them lies in memory that only its process can read."""
        mine = [tensor.nbytes, zlib.crc32(f"{what} {tensor.dtype}".encode())]
        table = self._tell([tensor.data_ptr(), int(tensor.is_pinned()), *mine])
        for rank, (_, _, *theirs) in enumerate(table):
            if theirs != table[0][2:]:
                raise RuntimeError(
                    f"mpi4py: {what}: rank {rank} has {theirs[0]} bytes and rank 0 has {table[0][2]}"
                    + (", of another dtype or reduction" if theirs[1] != table[0][3] else "")
                )
        return None if any(row[1] for row in table) else [row[0] for row in table]

    def _meet(self) -> None:
        bad = [rank for rank, (failed,) in enumerate(self._tell([bool(self._failed)])) if failed]
        words, self._failed = self._failed, ""
        if bad:
            raise RuntimeError(f"mpi4py: rank {bad[0]} could not read its neighbours' memory {words}".rstrip())

    def _add(self, mine: torch.Tensor, places: list[int], kind: str, out: torch.Tensor) -> None:
        """out, which may be mine, = mine and what lies at the others' places, in the order of ranks; halves in float32, rounded
        once."""
        add, half = ADDERS[kind], mine.dtype in HALVES
        step, last = BLOCK_BYTES // mine.element_size(), self.ranks - 1
        blocks = self._blocks.view(mine.dtype)
        for begin in range(0, mine.numel(), step):
            own, into = mine[begin : begin + step], out[begin : begin + step]
            total = own
            for rank in range(self.ranks):
                source = own
                if rank != self.rank:
                    source = blocks[min(rank, 1), : len(own)]
                    self._read(rank, places[rank] + begin * own.element_size(), source)
                if rank == 0:
                    total = self._wide[: len(own)].copy_(source) if half else source
                elif rank < last and not half:
                    total = add(total, source, out=blocks[0, : len(own)])
                else:
                    total = add(total, source, out=total if half else into)
            if kind == "AVG":
                average(total, self.ranks)
            if half:
                into.copy_(total)

    def allreduce(self, flat: torch.Tensor, kind: str) -> bool:
        """In place. False: not done, nor begun."""
        places, size = self._begin(flat, f"all_reduce {kind}"), flat.element_size()
        if places is None:
            return False
        share = -(-len(flat) // (self.ranks * ALIGN)) * ALIGN
        low, high = (min(rank * share, len(flat)) for rank in (self.rank, self.rank + 1))
        self._add(flat[low:high], [place + low * size for place in places], kind, flat[low:high])
        self._meet()
        for i in range(1, self.ranks):
            rank = (self.rank + i) % self.ranks  # each begins with another
            self._read(rank, places[rank] + rank * share * size, flat[rank * share : (rank + 1) * share])
        self._meet()
        return True

    def reduce_scatter(self, rows: torch.Tensor, out: torch.Tensor, kind: str) -> bool:
        """rows (ranks, n) reduced; rank r has the r-th row in out (n), which lies elsewhere. False: not done, nor begun."""
        places = self._begin(rows, f"reduce_scatter {kind}")
        if places is not None:
            self._add(rows[self.rank], [place + self.rank * out.nbytes for place in places], kind, out)
            self._meet()
        return places is not None

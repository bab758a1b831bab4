"""Large reductions within a node, without messages. Each rank reads one range of the other ranks' tensors and reduces it.

Linux's process_vm_readv copies from another process's memory. A tensor must not change while another rank reads it. Therefore the
ranks synchronize three times: at the start, when they exchange addresses; between reduction and gathering; and at the end. A
shared-memory window was slower, because it needs one more copy of each value and synchronizes for each piece
(docs/results/2026-11-27-c10d.md).
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

BLOCK_BYTES = 1 << 19  # bytes read and reduced at a time; they fit in a core's cache
READ_BYTES = 1 << 26  # most bytes per system call; Linux's limit is 2 GiB
ALIGN = 64  # each rank's range starts at a multiple of this many elements
NEAR = "MPIDP_C10D_NEAR"  # if it is "messages" on any rank, large reductions within a node use messages, too
SET_PTRACER, ANY_PROCESS = 0x59616D61, ctypes.c_ulong(-1)  # PR_SET_PTRACER for prctl (Linux's Yama module)
TOKEN = 2  # number of random integers that identify a process
FOUND, DENIED, IMPOSSIBLE = range(3)
Exchange = Callable[[list[int]], list[list[int]]]  # an allgather of each rank's list of numbers


class _Vector(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _reader() -> Any:
    """Return the C function process_vm_readv, or None if the system has no such function."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if function is not None:
        function.restype = ctypes.c_ssize_t
        vector = ctypes.POINTER(_Vector)
        function.argtypes = (ctypes.c_int, vector, ctypes.c_ulong, vector, ctypes.c_ulong, ctypes.c_ulong)
    return function


class Neighbours:
    """Reduces tensors of one group by reading other ranks' memory. Public methods are Collective over the group.

    Tensors must be flat, contiguous and on the host, and their dtype must be in sums.ADDED. kind: a key of sums.OPS. Raises
    RuntimeError on all ranks if the ranks' calls differ, or if reading memory fails.
    """

    def __init__(self, exchange: Exchange, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self._exchange = exchange
        self._function = _reader()
        self._failed = ""
        self._blocks = torch.empty(2, BLOCK_BYTES, dtype=torch.uint8)  # the data read; the first block also stores partial sums
        self._wide = torch.empty(BLOCK_BYTES // 2)  # float32 sums of half-precision values
        self._pids: list[int] = []

    def can_read_all(self) -> bool:
        """Return whether all ranks can read each other's memory.

        If only permission is missing (Yama's ptrace_scope 1), each rank grants permission, as MPI libraries do, and tries again.
        """
        token = torch.frombuffer(bytearray(os.urandom(8 * TOKEN)), dtype=torch.int64)
        table = self._exchange([os.getpid(), token.data_ptr(), *token.tolist()])
        self._pids = [row[0] for row in table]
        for _ in range(2):
            worst = max(self._probe(rank, table[rank]) for rank in range(self.ranks))
            worst = max(row[0] for row in self._exchange([worst]))
            if worst != DENIED:
                break
            ctypes.CDLL(None).prctl(SET_PTRACER, ANY_PROCESS, 0, 0, 0)
        return worst == FOUND

    def _probe(self, rank: int, row: list[int]) -> int:
        """Try to read another rank's token. Return FOUND, DENIED or IMPOSSIBLE.

        The process id of a rank on another node may belong to an unrelated local process. The token then differs.
        """
        if self._function is None or os.environ.get(NEAR) == "messages":
            return IMPOSSIBLE
        found = torch.zeros(TOKEN, dtype=torch.int64)
        self._read(rank, row[1], found)
        failed, self._failed = self._failed, ""
        if failed:
            return DENIED if ctypes.get_errno() == errno.EPERM else IMPOSSIBLE
        return FOUND if found.tolist() == row[2:] else IMPOSSIBLE

    def _read(self, rank: int, address: int, into: torch.Tensor) -> None:
        """Read another rank's memory at `address`. If this fails, the next _synchronize() raises an error."""
        for begin in range(0, into.nbytes, READ_BYTES):
            length = min(READ_BYTES, into.nbytes - begin)
            local, remote = _Vector(into.data_ptr() + begin, length), _Vector(address + begin, length)
            if self._function(self._pids[rank], local, 1, remote, 1, 0) != length:
                self._failed = self._failed or f"rank {rank}'s memory: {os.strerror(ctypes.get_errno())}"

    def _begin(self, tensor: torch.Tensor, call: str) -> list[int] | None:
        """Return the address of each rank's tensor.

        Returns None on all ranks if a tensor is in pinned memory, which other processes cannot read. Raises RuntimeError if the
        ranks' calls differ.
        """
        signature = [tensor.nbytes, zlib.crc32(f"{call} {tensor.dtype}".encode())]
        table = self._exchange([tensor.data_ptr(), int(tensor.is_pinned()), *signature])
        for rank, (_, _, *found) in enumerate(table):
            if found != table[0][2:]:
                raise RuntimeError(
                    f"mpi4py: {call}: rank {rank} has {found[0]} bytes and rank 0 has {table[0][2]}"
                    + (", and another dtype or reduction" if found[1] != table[0][3] else "")
                )
        return None if any(row[1] for row in table) else [row[0] for row in table]

    def _synchronize(self) -> None:
        bad = [rank for rank, (failed,) in enumerate(self._exchange([bool(self._failed)])) if failed]
        details, self._failed = self._failed, ""
        if bad:
            raise RuntimeError(
                f"mpi4py: rank {bad[0]} could not read the memory of ranks on its node" + (f": {details}" if details else "")
            )

    def _add(self, local: torch.Tensor, places: list[int], kind: str, out: torch.Tensor) -> None:
        """Reduce `local` and the tensors at the other ranks' addresses into out, in rank order. out may be `local`.

        Half-precision values are added in float32 and rounded once.
        """
        add, half = ADDERS[kind], local.dtype in HALVES
        step, last = BLOCK_BYTES // local.element_size(), self.ranks - 1
        blocks = self._blocks.view(local.dtype)
        for begin in range(0, local.numel(), step):
            own, into = local[begin : begin + step], out[begin : begin + step]
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
        """Reduce a tensor over all ranks, in place. Returns False and changes nothing if a tensor is in pinned memory."""
        places, size = self._begin(flat, f"all_reduce {kind}"), flat.element_size()
        if places is None:
            return False
        share = -(-len(flat) // (self.ranks * ALIGN)) * ALIGN
        low, high = (min(rank * share, len(flat)) for rank in (self.rank, self.rank + 1))
        self._add(flat[low:high], [place + low * size for place in places], kind, flat[low:high])
        self._synchronize()
        for i in range(1, self.ranks):
            rank = (self.rank + i) % self.ranks  # each rank starts by reading from a different rank
            self._read(rank, places[rank] + rank * share * size, flat[rank * share : (rank + 1) * share])
        self._synchronize()
        return True

    def reduce_scatter(self, rows: torch.Tensor, out: torch.Tensor, kind: str) -> bool:
        """Reduce rows (ranks, n) and store row r in out (n) on rank r. out must not overlap rows.

        Returns False and changes nothing if a tensor is in pinned memory.
        """
        places = self._begin(rows, f"reduce_scatter {kind}")
        if places is not None:
            self._add(rows[self.rank], [place + self.rank * out.nbytes for place in places], kind, out)
            self._synchronize()
        return places is not None

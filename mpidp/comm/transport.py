"""Passes tensors to MPI, directly or through pinned host memory.

For a piece (range of elements) of a tensor, `Messages.load` returns a *wire* tensor, which MPI may read and write. On the CPU
the wire tensor is the piece itself. On CUDA the wire tensor depends on the mode. In mode "staged", it is a copy in pinned host
memory. In mode "device", it is the piece itself, and load() first synchronizes the current stream. Mode "device" needs a
CUDA-aware MPI library. With comm.gpu=auto, it is used only if a test has shown that MPI accepts CUDA pointers (probe.py). The
class Nccl (nccl.py) has the same methods, but sends gradients with NCCL.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from mpi4py import MPI

from mpidp.comm.buffers import buf, bufv
from mpidp.comm.waiting import Wait

PIECE_BYTES = 4 << 20  # for larger messages MPICH and Open MPI allocate new temporary memory, which causes page faults
RankParts = tuple[torch.Tensor, Sequence[int], Sequence[int]]  # (tensor, length of each rank's range, start of each rank's range)


class Messages:
    """Exchanges tensors over MPI. Counts the bytes that this rank sends, and the seconds spent in timed(). pop_counts() returns
    both. The bytes include messages to ranks that hold other parts of the same replica. Independent."""

    in_thread = True  # whether a thread may exchange gradients during backward

    def __init__(self, device: torch.device, mode: str = "host") -> None:
        """`mode`: "host" for CPU tensors. For CUDA tensors, "staged" (through host memory) or "device" (directly)."""
        self.mode = mode
        self.device = device
        self.sent_bytes = 0
        self.seconds = 0.0
        self._scratch: dict[object, torch.Tensor] = {}

    def scratch(self, key: object, elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return a buffer of shape (elements,) that MPI can read and write. Calls with the same `key` return the same memory,
        and must pass the same `dtype`."""
        held = self._scratch.get(key)
        if held is None or held.numel() < elements:
            staged = self.mode == "staged"
            held = torch.empty(elements, dtype=dtype, device="cpu" if staged else self.device, pin_memory=staged)
            self._scratch[key] = held
        return held[:elements]

    def load(self, piece: torch.Tensor, key: object) -> torch.Tensor:
        """Return a wire tensor (one that MPI can read and write) with the current values of `piece`. If the values must be
        copied, they are copied to the buffer named `key`."""
        if piece.device.type == "cpu":
            return piece
        if self.mode == "staged":
            wire = self.scratch(("load", key), piece.numel(), piece.dtype)
            wire.copy_(piece, non_blocking=True)
            torch.cuda.current_stream(self.device).synchronize()  # a thread's current device may be a different one
            return wire
        torch.cuda.current_stream(self.device).synchronize()
        return piece

    def store(self, wire: torch.Tensor, piece: torch.Tensor) -> None:
        """Copy the values of `wire`, a result of load(), into `piece`. Later work on the device's stream sees the new values."""
        if wire.data_ptr() != piece.data_ptr():
            piece.copy_(wire)

    def ready(self) -> None:
        """Wait until torch has finished writing wire tensors, so that they may be passed to MPI."""
        if self.mode == "device":
            torch.cuda.current_stream(self.device).synchronize()

    def alltoallv(self, comm: MPI.Intracomm, wait: Wait, source: RankParts, target: RankParts) -> None:
        """Send range r of `source` to each rank r of `comm`, and receive range r of `target` from it. `source`, `target`: (wire
        tensor, length of each rank's range, start of each rank's range). Collective over comm."""
        wait(comm.Ialltoallv(bufv(*source), bufv(*target)))
        self.sent_bytes += source[0].element_size() * sum(source[1])

    def allgatherv(self, comm: MPI.Intracomm, wait: Wait, whole: RankParts) -> None:
        """Fill a wire tensor on all ranks, in place. Each rank has written its own range, and receives the ranges of the other
        ranks. `whole`: (wire tensor, length of each rank's range, start of each rank's range). Collective over comm."""
        wait(comm.Iallgatherv(MPI.IN_PLACE, bufv(*whole)))
        self.sent_bytes += whole[0].element_size() * whole[1][comm.rank] * (comm.size - 1)

    def allreduce(self, comm: MPI.Intracomm, wait: Wait, wire: torch.Tensor, blocking: bool) -> None:
        """Sum `wire` over the ranks, in place. MPI chooses the order of addition. `blocking`: whether to use MPI's blocking call.
        With Open MPI, it is up to 2.7 times as fast as the non-blocking call, but adds in another order. All ranks must pass the
        same value. Collective over comm."""
        if blocking:
            comm.Allreduce(MPI.IN_PLACE, buf(wire))
        else:
            wait(comm.Iallreduce(MPI.IN_PLACE, buf(wire)))
        self.sent_bytes += 2 * wire.nbytes * (comm.size - 1) // comm.size

    def pop_counts(self) -> tuple[int, float]:
        """Return (bytes sent, seconds) since the last call of pop_counts(), and reset both to zero."""
        counts = self.sent_bytes, self.seconds
        self.sent_bytes, self.seconds = 0, 0.0
        return counts

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Return a context manager. The time spent in its body is added to the seconds that pop_counts() returns."""
        begin = time.perf_counter()
        yield
        self.synchronize()
        self.seconds += time.perf_counter() - begin

    def synchronize(self) -> None:
        """Wait until the started exchanges are done. With MPI this method does nothing, because an exchange is done when its
        method returns. Independent."""

    def close(self) -> None:
        """Close the transport after the last exchange. Collective over the ranks that exchange."""


def allgather_ranges(transport: Messages, comm: MPI.Intracomm, wait: Wait, flat: torch.Tensor, parts: Sequence[range]) -> None:
    """Fill `flat` on all ranks, in place. Each rank has written its own range, and receives the ranges of the other ranks.
    `parts`: the range of elements of each rank of `comm`. Collective over comm."""
    step = max(1, PIECE_BYTES // 4 // comm.size)
    for low in range(0, max(map(len, parts)), step):
        now = [part[low : low + step] for part in parts]
        lengths, starts = [len(part) for part in now], [part.start for part in now]
        if transport.mode == "staged":  # through pinned memory
            places = [rank * step for rank in range(comm.size)]
            wire = transport.scratch("slices", step * comm.size)
            wire[places[comm.rank] :][: lengths[comm.rank]] = flat[now[comm.rank].start : now[comm.rank].stop].cpu()
            transport.allgatherv(comm, wait, (wire, lengths, places))
            for part, at in zip(now, places, strict=True):
                flat[part.start : part.stop] = wire[at : at + len(part)].to(flat.device)
        else:
            transport.ready()
            transport.allgatherv(comm, wait, (flat, lengths, starts))


def pieces(start: int, stop: int, element_bytes: int = 4) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) for consecutive pieces of the elements [start, stop). Each piece has at most PIECE_BYTES. Pure."""
    step = PIECE_BYTES // element_bytes
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)

"""How bytes of gradients reach MPI: as messages, from where they lie or through pinned host memory.

`Messages` hands out, for a piece of a tensor, a *wire* tensor that MPI may read and write. On the CPU that is the piece
itself; on CUDA it is a pinned host copy (staged), or the piece itself once its stream is synchronised (device, for an MPI
that a probe has shown to be CUDA-aware). Reducers that exchange wire tensors by the methods here can do it without MPI too
(nccl.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from mpi4py import MPI

from mpidp.comm.buffers import buf, bufv
from mpidp.comm.waiting import Wait

PIECE_BYTES = 4 << 20  # larger messages make both MPIs allocate a temporary whose pages are faulted in anew each time
RankParts = tuple[torch.Tensor, Sequence[int], Sequence[int]]  # a tensor of which each rank has a part: its length, its start


class Messages:
    """Independent; it counts the bytes this rank sent, and the seconds it spent in exchanges of the strategy, until take(). What
    the ranks of one replica send each other in the middle of computing is a part of that."""

    in_thread = True  # may a thread exchange while backward goes on?

    def __init__(self, device: torch.device, mode: str = "host") -> None:
        """mode: host (CPU tensors), staged or device (CUDA tensors)."""
        self.mode = mode
        self.device = device
        self.sent_bytes = 0
        self.seconds = 0.0
        self._scratch: dict[object, torch.Tensor] = {}

    def scratch(self, key: object, elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A reused wire buffer, shape (elements,); the same key, the same dtype."""
        held = self._scratch.get(key)
        if held is None or held.numel() < elements:
            staged = self.mode == "staged"
            held = torch.empty(elements, dtype=dtype, device="cpu" if staged else self.device, pin_memory=staged)
            self._scratch[key] = held
        return held[:elements]

    def load(self, piece: torch.Tensor, key: object) -> torch.Tensor:
        """The wire tensor that holds the piece's values now."""
        if piece.device.type == "cpu":
            return piece
        if self.mode == "staged":
            wire = self.scratch(("load", key), piece.numel(), piece.dtype)
            wire.copy_(piece, non_blocking=True)
            torch.cuda.current_stream(self.device).synchronize()  # a thread's current device may be another
            return wire
        torch.cuda.current_stream(self.device).synchronize()
        return piece

    def store(self, wire: torch.Tensor, piece: torch.Tensor) -> None:
        """Put a wire tensor's values into the piece, before later work on the device's stream."""
        if wire.data_ptr() != piece.data_ptr():
            piece.copy_(wire)

    def ready(self) -> None:
        """Wire tensors written by torch may now be given to MPI."""
        if self.mode == "device":
            torch.cuda.current_stream(self.device).synchronize()

    def alltoallv(self, comm: MPI.Intracomm, wait: Wait, source: RankParts, target: RankParts) -> None:
        """Each rank gets its part of the source into this rank's part of the target; both are wire tensors, and nobody has a
        part for itself. Collective over comm."""
        wait(comm.Ialltoallv(bufv(*source), bufv(*target)))
        self.sent_bytes += source[0].element_size() * sum(source[1])

    def allgatherv(self, comm: MPI.Intracomm, wait: Wait, whole: RankParts) -> None:
        """Of this wire tensor each rank has written its own part; then all have the whole. Collective over comm."""
        wait(comm.Iallgatherv(MPI.IN_PLACE, bufv(*whole)))
        self.sent_bytes += whole[0].element_size() * whole[1][comm.rank] * (comm.size - 1)

    def allreduce(self, comm: MPI.Intracomm, wait: Wait, wire: torch.Tensor, blocking: bool) -> None:
        """The sum over the ranks, in place, in an order that is not ours, and another one when blocking (up to 2.7 times as fast,
        Open MPI), which all ranks must be or none. Collective over comm."""
        if blocking:
            comm.Allreduce(MPI.IN_PLACE, buf(wire))
        else:
            wait(comm.Iallreduce(MPI.IN_PLACE, buf(wire)))
        self.sent_bytes += 2 * wire.nbytes * (comm.size - 1) // comm.size

    def pop_counts(self) -> tuple[int, float]:
        """(bytes sent, seconds) since the last take, and start anew."""
        taken = self.sent_bytes, self.seconds
        self.sent_bytes, self.seconds = 0, 0.0
        return taken

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count what happens inside as communication."""
        begin = time.perf_counter()
        yield
        self.synchronize()
        self.seconds += time.perf_counter() - begin

    def synchronize(self) -> None:
        """Until exchanges that were begun are done: MPI's are when they return. Independent."""

    def close(self) -> None:
        """No more exchanges. Collective over the ranks that exchange."""


def pieces(start: int, stop: int, element_bytes: int = 4) -> Iterator[tuple[int, int]]:
    """[start, stop) in runs of at most PIECE_BYTES. Pure."""
    step = PIECE_BYTES // element_bytes
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)

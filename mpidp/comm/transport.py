"""How bytes of gradients reach MPI: as messages, from where they lie or through pinned host memory.

`Messages` hands out, for a piece of a tensor, a *wire* tensor that MPI may read and write. On the CPU that is the piece
itself; on CUDA it is a pinned host copy (staged), or the piece itself once its stream is synchronised (device, for an MPI
that a probe has shown to be CUDA-aware).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PIECE_BYTES = 4 << 20  # larger messages make both MPIs allocate a temporary whose pages are faulted in anew each time


class Messages:
    """Independent; it counts the bytes this rank sent and the seconds it spent in communication, until take()."""

    def __init__(self, device: torch.device, mode: str = "host") -> None:
        """mode: host (CPU tensors), staged or device (CUDA tensors)."""
        self.mode = mode
        self.device = device
        self.sent_bytes = 0
        self.seconds = 0.0
        self._scratch: dict[object, torch.Tensor] = {}

    def scratch(self, key: object, elements: int) -> torch.Tensor:
        """A reused float32 wire buffer of at least this many elements, shape (elements,)."""
        held = self._scratch.get(key)
        if held is None or held.numel() < elements:
            on_device = self.mode == "device"
            held = torch.empty(elements, device=self.device if on_device else "cpu", pin_memory=self.mode == "staged")
            self._scratch[key] = held
        return held[:elements]

    def load(self, piece: torch.Tensor, key: object) -> torch.Tensor:
        """The wire tensor that holds the piece's values now."""
        if piece.device.type == "cpu":
            return piece
        if self.mode == "staged":
            wire = self.scratch(("load", key), piece.numel())
            wire.copy_(piece, non_blocking=True)
            torch.cuda.current_stream().synchronize()
            return wire
        torch.cuda.current_stream().synchronize()
        return piece

    def store(self, wire: torch.Tensor, piece: torch.Tensor) -> None:
        """Put a wire tensor's values into the piece, before later work on the device's stream."""
        if wire.data_ptr() != piece.data_ptr():
            piece.copy_(wire)

    def ready(self) -> None:
        """Wire tensors written by torch may now be given to MPI."""
        if self.mode == "device":
            torch.cuda.current_stream().synchronize()

    def take(self) -> tuple[int, float]:
        """(bytes sent, seconds) since the last take, and start anew."""
        taken = self.sent_bytes, self.seconds
        self.sent_bytes, self.seconds = 0, 0.0
        return taken

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count what happens inside as communication."""
        begin = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin


def pieces(start: int, stop: int, element_bytes: int = 4) -> Iterator[tuple[int, int]]:
    """[start, stop) in runs of at most PIECE_BYTES. Pure."""
    step = PIECE_BYTES // element_bytes
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)

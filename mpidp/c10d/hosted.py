"""Host buffers, which MPI reads and writes. The host buffer of a tensor is the tensor itself if it is contiguous and on the host.
Otherwise it is a contiguous copy in host memory.

A CUDA tensor is copied through pinned memory. The copy to the host waits for the work on the caller's current CUDA stream. A call
completes only after the copy back to the device has finished, so any stream may read the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class HostBuffer:
    """The host buffer of one tensor that a call reads or writes. Independent."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Make the host buffer of `tensor`. The constructor records an event on the current CUDA stream. Call it in the thread
        that starts the collective."""
        self.tensor = tensor.detach()
        self._host: torch.Tensor | None = None
        self._written: Any = None
        if self.tensor.device.type == "cuda":
            self._written = torch.cuda.current_stream(self.tensor.device).record_event()

    def empty(self) -> torch.Tensor:
        """Return the host buffer without copying the tensor's values into it. It has the shape of the tensor. The caller fills
        it."""
        if self._host is None:
            plain = self.tensor.device.type == "cpu" and self.tensor.is_contiguous()
            cuda = self.tensor.device.type == "cuda"
            self._host = self.tensor if plain else torch.empty(
                self.tensor.shape, dtype=self.tensor.dtype, device="cpu", pin_memory=cuda
            )
        return self._host

    def load(self) -> torch.Tensor:
        """Return the host buffer, with the values of the tensor."""
        host = self.empty()
        if self._written is not None:
            self._written.synchronize()
        if host.data_ptr() != self.tensor.data_ptr():
            host.copy_(self.tensor)
        return host

    def store(self) -> None:
        """Copy the values of the host buffer back into the tensor."""
        if self._host is not None and self._host.data_ptr() != self.tensor.data_ptr():
            self.tensor.copy_(self._host)
            if self.tensor.device.type == "cuda":
                torch.cuda.current_stream(self.tensor.device).synchronize()


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device | None:
    """Return the device of the first tensor that is not on the CPU, or None. Pure."""
    return next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)

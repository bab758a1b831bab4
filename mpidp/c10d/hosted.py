"""The seam between tensors as the caller has them and contiguous tensors on the host, which MPI reads and writes.

A CUDA tensor goes through pinned memory: its values are copied once what the caller's stream has written is written, and come
back before the work is done, so that any stream may read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Hosted:
    """One tensor of a call. Independent."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """By the caller's thread, on whose current stream the tensor is written."""
        self.tensor = tensor.detach()
        self._host: torch.Tensor | None = None
        self._written: Any = None
        if self.tensor.device.type == "cuda":
            self._written = torch.cuda.current_stream(self.tensor.device).record_event()

    def empty(self) -> torch.Tensor:
        """Contiguous memory on the host, of its shape, to be written: its own where it can be."""
        if self._host is None:
            plain = self.tensor.device.type == "cpu" and self.tensor.is_contiguous()
            cuda = self.tensor.device.type == "cuda"
            self._host = self.tensor if plain else torch.empty(
                self.tensor.shape, dtype=self.tensor.dtype, device="cpu", pin_memory=cuda
            )
        return self._host

    def load(self) -> torch.Tensor:
        """The same with the tensor's values."""
        host = self.empty()
        if self._written is not None:
            self._written.synchronize()
        if host.data_ptr() != self.tensor.data_ptr():
            host.copy_(self.tensor)
        return host

    def store(self) -> None:
        """What was written to the host, into the tensor."""
        if self._host is not None and self._host.data_ptr() != self.tensor.data_ptr():
            self.tensor.copy_(self._host)
            if self.tensor.device.type == "cuda":
                torch.cuda.current_stream(self.tensor.device).synchronize()


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device | None:
    """The first that is not the host. Pure."""
    return next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)

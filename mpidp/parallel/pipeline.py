"""Sends hidden states to the next pipeline stage, and their gradients to the previous stage. Sends do not block. drain() waits
for all sends of a step."""

from __future__ import annotations

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.buffers import memory
from mpidp.comm.transport import Messages
from mpidp.parallel.grid import Grid

FORWARD, BACKWARD = 0, 1


class Stages:
    """This rank's stage in the pipeline of its replica. A pipeline of one stage sends nothing."""

    def __init__(self, grid: Grid, transport: Messages, device: torch.device, chunks: int = 1) -> None:
        """chunks: number of chunks (groups of consecutive layers) per stage. The last stage sends the output of its chunk c to
        chunk c + 1 of the first stage."""
        self.comm, self.wait, self._transport, self._device = grid.pp, grid.wait, transport, device
        self.index, self.count = self.comm.rank, self.comm.size
        self.first, self.last = self.index == 0, self.index == self.count - 1
        self.chunks = chunks
        self._sent: list[tuple[MPI.Request, Tensor]] = []

    def is_first(self, chunk: int = 0) -> bool:
        """Return whether this chunk of this stage is the first of the model. Pure."""
        return self.first and chunk == 0

    def is_last(self, chunk: int = 0) -> bool:
        """Return whether this chunk of this stage is the last of the model. Pure."""
        return self.last and chunk == self.chunks - 1

    def receive(self, kind: int, v: int, shape: tuple[int, ...], chunk: int = 0) -> Tensor:
        """Receive a message of micro-batch `v` for chunk `chunk` of this stage. kind: FORWARD for the hidden states that the
        chunk takes as input, or BACKWARD for the gradient of the chunk's output. The result has the shape `shape`, and is
        float32 in any training precision. This call waits for the message. Independent."""
        source = (self.index - 1 if kind == FORWARD else self.index + 1) % self.count
        wire = torch.empty(shape, pin_memory=self._transport.mode == "staged")
        self.wait(self.comm.Irecv([memory(wire), MPI.BYTE], source=source, tag=self._tag(kind, v, chunk)))
        return wire.to(self._device)

    def send(self, kind: int, v: int, x: Tensor, chunk: int = 0) -> None:
        """Send `x` without waiting until it is received. If `kind` is FORWARD, `x` is the output of chunk `chunk`, and goes to
        the next stage. If `kind` is BACKWARD, `x` is the gradient of the chunk's input, and goes to the previous stage. v: the
        micro-batch. Independent."""
        target, to = (self.index + 1, chunk + self.last) if kind == FORWARD else (self.index - 1, chunk - self.first)
        wire = x.detach().float().contiguous().cpu()
        self._sent = [(request, held) for request, held in self._sent if not request.Test()]
        tag = self._tag(kind, v, to)
        self._sent.append((self.comm.Isend([memory(wire), MPI.BYTE], dest=target % self.count, tag=tag), wire))
        self._transport.sent_bytes += wire.nbytes

    def _tag(self, kind: int, v: int, chunk: int) -> int:
        """Return the MPI tag of a message about micro-batch `v`. chunk: the index of the chunk that receives the message."""
        return 2 * (v * self.chunks + chunk) + kind

    def drain(self, losses: list[float]) -> list[float]:
        """Wait until all sends are complete. On every stage, return the losses of the last stage. losses: this stage's losses.
        Collective over comm."""
        last_losses = np.array(losses)
        for request, _ in self._sent:
            self.wait(request)
        self.wait(self.comm.Ibcast(last_losses, root=self.count - 1))
        self._sent.clear()
        return last_losses.tolist()  # type: ignore[no-any-return]

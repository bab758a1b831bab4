"""Between the stages of a pipeline: hidden states go forward, their gradients back, each a message that is named after its
micro-batch. Sends do not wait for whoever receives them; a step ends when all have been taken."""

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
    """This rank's place among the stages of its replica; of one stage alone, which sends nothing."""

    def __init__(self, grid: Grid, transport: Messages, device: torch.device, chunks: int = 1) -> None:
        """chunks: how often each stage comes, the first after the last."""
        self.comm, self.wait, self._transport, self._device = grid.pp, grid.wait, transport, device
        self.index, self.count = self.comm.rank, self.comm.size
        self.first, self.last = self.index == 0, self.index == self.count - 1
        self.chunks = chunks
        self._sent: list[tuple[MPI.Request, Tensor]] = []

    def is_first(self, chunk: int = 0) -> bool:
        """Does nothing come before this chunk of the stage? Pure."""
        return self.first and chunk == 0

    def is_last(self, chunk: int = 0) -> bool:
        """Does nothing come after it? Pure."""
        return self.last and chunk == self.chunks - 1

    def receive(self, kind: int, v: int, shape: tuple[int, ...], chunk: int = 0) -> Tensor:
        """What the stage before (FORWARD) or after (BACKWARD) sent of micro-batch v to a chunk, float32: residual streams are,
        whatever the layers compute in. Independent, once that stage has come so far."""
        source = (self.index - 1 if kind == FORWARD else self.index + 1) % self.count
        wire = torch.empty(shape, pin_memory=self._transport.mode == "staged")
        self.wait(self.comm.Irecv([memory(wire), MPI.BYTE], source=source, tag=self._tag(kind, v, chunk)))
        return wire.to(self._device)

    def send(self, kind: int, v: int, x: Tensor, chunk: int = 0) -> None:
        """Hidden states of a chunk on to the next stage, or their gradient back to the one before. Independent."""
        target, to = (self.index + 1, chunk + self.last) if kind == FORWARD else (self.index - 1, chunk - self.first)
        wire = x.detach().float().contiguous().cpu()
        self._sent = [(request, held) for request, held in self._sent if not request.Test()]
        tag = self._tag(kind, v, to)
        self._sent.append((self.comm.Isend([memory(wire), MPI.BYTE], dest=target % self.count, tag=tag), wire))
        self._transport.sent_bytes += wire.nbytes

    def _tag(self, kind: int, v: int, chunk: int) -> int:
        """chunk: of whoever receives."""
        return 2 * (v * self.chunks + chunk) + kind

    def drain(self, losses: list[float]) -> list[float]:
        """Until all that was sent is taken; all stages have the losses of the last one then. Collective over comm."""
        told = np.array(losses)
        for request, _ in self._sent:
            self.wait(request)
        self.wait(self.comm.Ibcast(told, root=self.count - 1))
        self._sent.clear()
        return told.tolist()  # type: ignore[no-any-return]

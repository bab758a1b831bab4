"""Averaging with some ranks of a communicator instead of all: a group, or one peer each way. In pieces."""

from __future__ import annotations

from collections.abc import Sequence

from mpi4py import MPI
from torch import Tensor

from mpidp.comm.buffers import buf
from mpidp.comm.transport import Messages, pieces


class Peers:
    """Groups that come again keep their communicator."""

    def __init__(self, comm: MPI.Intracomm, transport: Messages) -> None:
        self.comm, self.transport = comm, transport
        self._groups: dict[tuple[int, ...], MPI.Intracomm] = {}

    def average(self, flat: Tensor, ranks: Sequence[int], spare: Tensor) -> None:
        """flat (n,) becomes the mean over these ranks, of which this is one; spare: (n,), overwritten. The same bits on all of
        them. Collective over the ranks."""
        if len(ranks) == 2:
            self._exchange(flat, other := ranks[ranks[0] == self.comm.rank], other, spare)
        elif len(ranks) > 2:
            group = self._group(tuple(ranks))
            for start, stop in pieces(0, flat.numel()):
                spare[start:stop] = flat[start:stop] / len(ranks)
                wire = self.transport.load(spare[start:stop], "peers")
                group.Allreduce(MPI.IN_PLACE, buf(wire))
                self.transport.sent_bytes += 2 * wire.nbytes * (len(ranks) - 1) // len(ranks)
                self.transport.store(wire, flat[start:stop])

    def gossip(self, flat: Tensor, hop: int, spare: Tensor) -> None:
        """flat (n,) becomes the mean of itself and that of the rank `hop` places before on the ring. Collective over comm."""
        if hop % self.comm.size:
            self._exchange(flat, (self.comm.rank + hop) % self.comm.size, (self.comm.rank - hop) % self.comm.size, spare)

    def _exchange(self, flat: Tensor, to: int, source: int, spare: Tensor) -> None:
        """The mean of itself and what comes from `source`, while it goes to `to`."""
        for start, stop in pieces(0, flat.numel()):
            wire = self.transport.load(flat[start:stop], "peers")
            heard = self.transport.load(spare[start:stop], "heard")
            self.comm.Sendrecv(buf(wire), to, 0, buf(heard), source, 0)
            self.transport.sent_bytes += wire.nbytes
            self.transport.store(heard, spare[start:stop])
            flat[start:stop].add_(spare[start:stop]).mul_(0.5)

    def _group(self, ranks: tuple[int, ...]) -> MPI.Intracomm:
        if ranks not in self._groups:
            self._groups[ranks] = self.comm.Create_group(self.comm.group.Incl(ranks))
        return self._groups[ranks]

    def close(self) -> None:
        """Collective over the groups' ranks, in the order in which they came."""
        while self._groups:
            self._groups.pop(next(iter(self._groups))).Free()

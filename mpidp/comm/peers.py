"""Averages a tensor over a group of ranks, or over two ranks."""

from __future__ import annotations

from collections.abc import Sequence

from mpi4py import MPI
from torch import Tensor

from mpidp.comm.buffers import buf
from mpidp.comm.transport import Messages, pieces


class Peers:
    """Averages flat tensors with other ranks, piece by piece. It keeps one communicator for each group of ranks that has
    averaged."""

    def __init__(self, comm: MPI.Intracomm, transport: Messages) -> None:
        self.comm, self.transport = comm, transport
        self._groups: dict[tuple[int, ...], MPI.Intracomm] = {}

    def average(self, flat: Tensor, ranks: Sequence[int], spare: Tensor) -> None:
        """Replace `flat` (n,) by its mean over `ranks`, which must include this rank. All `ranks` get the same bits. `spare`: a
        tensor (n,) that is overwritten. Collective over `ranks`."""
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
        """Replace `flat` (n,) by the mean of two tensors: this rank's `flat`, and `flat` of rank (rank - hop) mod size. `spare`:
        a tensor (n,) that is overwritten. Collective over comm."""
        if hop % self.comm.size:
            self._exchange(flat, (self.comm.rank + hop) % self.comm.size, (self.comm.rank - hop) % self.comm.size, spare)

    def _exchange(self, flat: Tensor, to: int, source: int, spare: Tensor) -> None:
        """Send `flat` to rank `to`, receive a tensor from rank `source`, and replace `flat` by the mean of the two. `spare` gets
        the received tensor."""
        for start, stop in pieces(0, flat.numel()):
            wire = self.transport.load(flat[start:stop], "peers")
            received = self.transport.load(spare[start:stop], "received")
            self.comm.Sendrecv(buf(wire), to, 0, buf(received), source, 0)
            self.transport.sent_bytes += wire.nbytes
            self.transport.store(received, spare[start:stop])
            flat[start:stop].add_(spare[start:stop]).mul_(0.5)

    def _group(self, ranks: tuple[int, ...]) -> MPI.Intracomm:
        if ranks not in self._groups:
            self._groups[ranks] = self.comm.Create_group(self.comm.group.Incl(ranks))
        return self._groups[ranks]

    def close(self) -> None:
        """Free the communicators, in the order in which they were made. Collective over the ranks of each group."""
        while self._groups:
            self._groups.pop(next(iter(self._groups))).Free()

"""How the contributions to the gradient are added: four ways, one protocol.

| name | sum | bits depend on | use |
|---|---|---|---|
| tree | owners of slices add lanes along a fixed binary tree | the lanes alone | the default |
| allreduce | MPI_Allreduce, in pieces | ranks, MPI library | least bytes when lanes are uneven over ranks |
| naive | one blocking MPI_Allreduce a parameter | ranks, MPI library | the oracle of allreduce |
| root | gathered, added and applied by rank 0, sent back | ranks | the oldest form; an oracle |

After `finish`, slot 0 of the buffer holds the sum over all lanes of the global batch: on every rank, except under `root`,
where rank 0 alone holds it, updates, and `publish`es.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from mpi4py import MPI

from mpidp.comm import tree
from mpidp.comm.buckets import Bucket, GradientBuffer, slice_bounds
from mpidp.comm.buffers import buf, bufv, datatype, memory
from mpidp.comm.transport import Messages, pieces
from mpidp.lanes import Lanes


class Reducer:
    """A member of the family; this base keeps one gradient buffer into which all micro-batches of the rank accumulate."""

    everyone_updates = True  # else rank 0 alone

    def __init__(self, comm: MPI.Intracomm, lanes: Lanes, transport: Messages) -> None:
        self.comm, self.lanes, self.transport = comm, lanes, transport
        self.num_slots = 1
        self.holds_sum = True  # does this rank hold the sum after finish()?
        self.buffer: GradientBuffer
        self._fresh = True

    def attach(self, buffer: GradientBuffer) -> None:
        """Give it the gradients; the buffer has at least num_slots slots. Independent."""
        self.buffer = buffer

    def open(self, v: int) -> None:
        """Point .grad to where micro-batch v accumulates. Independent."""
        self.buffer.point(0)
        if self._fresh:
            self.buffer.flat[0].zero_()
            self._fresh = False

    def close(self, v: int) -> None:
        """Micro-batch v is in. Independent."""

    def begin(self, bucket: Bucket) -> None:
        """The rank's own gradients of this bucket are complete: its reduction may start. This family waits for finish."""

    def finish(self) -> None:
        """Slot 0 now holds the sum. Collective over comm."""
        with self.transport.timed():
            for bucket in self.buffer.buckets:
                self.reduce(bucket)
        self._fresh = True
        self.buffer.point(0)

    def reduce(self, bucket: Bucket) -> None:
        """Sum one bucket. Collective over comm."""
        raise NotImplementedError

    def publish(self, tensors: Iterable[torch.Tensor]) -> None:
        """What the rank that updated must send to the others; nothing where everybody updates. Collective over comm."""


class Allreduce(Reducer):
    """MPI's own sum, in pieces."""

    def reduce(self, bucket: Bucket) -> None:
        if self.comm.size > 1:
            for start, stop in pieces(bucket.start, bucket.stop):
                self._sum(self.buffer.flat[0, start:stop])

    def _sum(self, piece: torch.Tensor) -> None:
        wire = self.transport.load(piece, "allreduce")
        self.comm.Allreduce(MPI.IN_PLACE, buf(wire))
        self.transport.sent_bytes += 2 * wire.nbytes * (self.comm.size - 1) // self.comm.size
        self.transport.store(wire, piece)


class Naive(Allreduce):
    """One blocking Allreduce a parameter: the form that everybody can check by eye."""

    def reduce(self, bucket: Bucket) -> None:
        for shape, offset in zip(bucket.shapes, bucket.offsets, strict=True):
            self._sum(self.buffer.flat[0, offset : offset + shape.numel()])


class Root(Reducer):
    """Gather to rank 0, which adds in rank order, updates, and broadcasts the parameters."""

    everyone_updates = False

    def __init__(self, comm: MPI.Intracomm, lanes: Lanes, transport: Messages) -> None:
        super().__init__(comm, lanes, transport)
        self.holds_sum = comm.rank == 0

    def reduce(self, bucket: Bucket) -> None:
        for start, stop in pieces(bucket.start, bucket.stop):
            piece = self.buffer.flat[0, start:stop]
            wire = self.transport.load(piece, "root")
            if self.holds_sum:
                gathered = self.transport.scratch("gathered", self.comm.size * wire.numel())
                self.comm.Gather(buf(wire), [memory(gathered), wire.numel(), datatype(gathered)], root=0)  # a count a rank
                rows = gathered.view(self.comm.size, -1)
                for rank in range(1, self.comm.size):
                    rows[0] += rows[rank]
                self.transport.store(rows[0], piece)
            else:
                self.comm.Gather(buf(wire), None, root=0)
                self.transport.sent_bytes += wire.nbytes

    def publish(self, tensors: Iterable[torch.Tensor]) -> None:
        with self.transport.timed():
            for tensor in tensors:
                wire = self.transport.load(tensor.detach().view(-1), "publish")
                self.comm.Bcast(buf(wire), root=0)
                self.transport.store(wire, tensor.detach().view(-1))
                self.transport.sent_bytes += wire.nbytes if self.holds_sum else 0


class Tree(Reducer):
    """The owner of each slice adds what the ranks were left with, in the order of the tree over lanes (see tree.py)."""

    def __init__(self, comm: MPI.Intracomm, lanes: Lanes, transport: Messages) -> None:
        super().__init__(comm, lanes, transport)
        mine = lanes.of_rank(comm.rank, comm.size)
        single = lanes.num_lanes == lanes.num_micro_batches
        plans, _ = tree.plan(mine, lanes.num_lanes, siblings_share=single)
        everyone = [tree.plan(lanes.of_rank(r, comm.size), lanes.num_lanes, single)[1] for r in range(comm.size)]
        self._nodes = [len(nodes) for nodes in everyone]  # how many slots each rank is left with
        self._program = tree.addition_program(everyone, lanes.num_lanes)
        self.num_slots = tree.num_slots(plans)
        self._opens = {lanes.micro_batches(lane)[0]: p for lane, p in zip(mine, plans, strict=True)}
        self._closes = {lanes.micro_batches(lane)[-1]: p for lane, p in zip(mine, plans, strict=True)}

    def open(self, v: int) -> None:
        if v in self._opens:
            plan = self._opens[v]
            self.buffer.point(plan.slot)
            if plan.fresh:
                self.buffer.flat[plan.slot].zero_()

    def close(self, v: int) -> None:
        if v in self._closes:
            for into, source in self._closes[v].folds:
                self.buffer.flat[into] += self.buffer.flat[source]

    def reduce(self, bucket: Bucket) -> None:
        for start, stop in pieces(bucket.start, bucket.stop):
            self._reduce_piece(start, stop)

    def _reduce_piece(self, start: int, stop: int) -> None:
        """Every rank sends each owner its nodes' slices; the owner adds; everybody receives the sums."""
        comm, wire = self.comm, self.transport
        bounds = slice_bounds(stop - start, comm.size)
        lengths = [high - low for low, high in zip(bounds, bounds[1:], strict=False)]
        low, high = bounds[comm.rank], bounds[comm.rank + 1]
        length = high - low
        rounds = max(self._nodes)
        mine = [wire.load(self.buffer.flat[j, start:stop], j) for j in range(self._nodes[comm.rank])]
        received: list[torch.Tensor] = []
        for j in range(rounds if comm.size > 1 else 0):
            sends = [n if j < len(mine) and r != comm.rank else 0 for r, n in enumerate(lengths)]
            takes = [length if j < self._nodes[r] and r != comm.rank else 0 for r in range(comm.size)]
            received.append(wire.scratch(("take", j), comm.size * length).view(comm.size, length))
            source = mine[j] if j < len(mine) else mine[0]
            comm.Alltoallv(
                bufv(source, sends, bounds[:-1]), bufv(received[j], takes, [r * length for r in range(comm.size)])
            )
            wire.sent_bytes += 4 * sum(sends)
        stack: list[torch.Tensor] = []
        for step in self._program:
            if step is None:
                right = stack.pop()
                stack[-1] += right  # in place: the left operand is this rank's own, sent or received, and not needed again
            else:
                rank, j = step
                stack.append(mine[j][low:high] if rank == comm.rank else received[j][rank])
        total = mine[0]
        if stack[0].data_ptr() != total[low:high].data_ptr():
            total[low:high] = stack[0]
        if comm.size > 1:
            wire.ready()
            comm.Allgatherv(MPI.IN_PLACE, bufv(total, lengths, bounds[:-1]))
            wire.sent_bytes += 4 * length * (comm.size - 1)
        wire.store(total, self.buffer.flat[0, start:stop])


REDUCERS: dict[str, type[Reducer]] = {"tree": Tree, "allreduce": Allreduce, "naive": Naive, "root": Root}

"""How the contributions to the gradient are added: one protocol, and its simplest members.

| name | sum | bits depend on | use |
|---|---|---|---|
| tree | owners of slices add lanes along a fixed binary tree (owners.py) | the lanes alone | the default |
| allreduce | MPI_Allreduce (or NCCL's), in pieces | ranks, MPI library, shared cores | least bytes when lanes are uneven |
| naive | one MPI_Allreduce a parameter | the same | the oracle of allreduce |
| root | gathered, added and applied by rank 0, sent back | ranks | the oldest form; an oracle |

and those of comm.compress, which send less (compressed.py).

After `finish`, `buffer.total` holds the sum over all lanes of the global batch: on every rank, except under `root`, where rank
0 alone holds it, updates, and `publish`es.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from mpi4py import MPI

from mpidp.checkpoint.entry import Entry
from mpidp.comm.buffers import buf, datatype, memory
from mpidp.comm.group import Group
from mpidp.comm.slices import NORM_BLOCK, squares_of_blocks
from mpidp.comm.transport import Messages, pieces
from mpidp.comm.waiting import Wait, spin
from mpidp.data.lanes import Lanes
from mpidp.reducers.buckets import Bucket, GradientBuffer
from mpidp.runtime.log import log
from mpidp.runtime.observers import NO_OBSERVERS, StepObservers


class LaneShares(Protocol):
    """Which lanes each rank computes in this step (balance.py)."""

    ranges: list[range]
    static: bool  # known to all before the step; else lanes change hands within a group, and ranks tell afterwards


class BucketWorker(Protocol):
    """A thread that reduces buckets in their order (overlap.py)."""

    def submit(self, bucket: Bucket) -> None:
        """Its gradients are complete. Independent."""

    def missing(self) -> list[Bucket]:
        """Not submitted in this step. Independent."""

    def wait(self) -> None:
        """Until all are reduced. Collective over those who share the work."""

    def close(self) -> None:
        """No more. Independent."""


NormOverParts = Callable[[GradientBuffer, torch.Tensor, torch.Tensor], float]  # (buffer, squares of blocks, flat) -> norm
LaneObserver = Callable[[int, torch.Tensor], None]  # (lane, its flat gradient), before it is added to any other


class Reducer:
    """A member of the family; this base keeps one gradient buffer into which all micro-batches of the rank accumulate."""

    everyone_updates = True  # else rank 0 alone
    own_order = True  # in which it adds, else MPI's, which is not the same in blocking calls and others (Open MPI)

    def __init__(
        self, group: Group, lanes: Lanes, transport: Messages, shares: LaneShares, num_slots: int = 1, *,
        observers: StepObservers = NO_OBSERVERS, norm_over_parts: NormOverParts | None = None,
    ) -> None:
        """norm_over_parts: the norm over the whole model, where this rank holds a part of it."""
        self.group, self.lanes, self.transport, self.shares, self.num_slots = group, lanes, transport, shares, num_slots
        self.observers, self._over_parts = observers, norm_over_parts
        self.comm = group.rail
        self.wait = group.wait  # inside a reduction
        self.worker: BucketWorker | None = None  # reduces while backward goes on (overlap.py)
        self.overlap_mode = "none"  # in which it does
        self.holds_sum = True  # does this rank hold the sum after finish()?
        self.buffer: GradientBuffer
        self._fresh = True

    def attach(self, buffer: GradientBuffer) -> None:
        """Give it the gradients; the buffer has at least num_slots slots. Independent."""
        self.buffer = buffer

    def wait_by(self, wait: Wait | None) -> None:
        """Wait this way inside a reduction; None: as the group does. Independent, between steps."""
        self.wait = wait or self.group.wait

    def overlap_by(self, way: str, wait: Wait | None, worker: BucketWorker | None) -> None:
        """Let this worker reduce buckets while backward runs; None: nobody does. way: its name (overlap.py). Independent, between
        steps."""
        self.stop_worker()
        self.overlap_mode, self.worker = way, worker
        self.wait_by(wait)

    def stop_worker(self) -> None:
        """End the thread that reduces. Independent."""
        if self.worker is not None:
            self.worker.close()

    def open(self, v: int, last: bool = False, chunk: int = 0) -> None:
        """Point .grad of a chunk to where micro-batch v accumulates; last: the rank's last of this step. Independent."""
        self.buffer.point(0)
        if self._fresh:
            self.buffer.flat[0].zero_()
            self._fresh = False

    def close(self, v: int, chunk: int = 0) -> None:
        """Micro-batch v is in, as far as it is this chunk's. Independent."""

    def observe_lanes(self, observers: Sequence[LaneObserver]) -> None:
        """In the step that begins, show each of these every lane; ValueError where lanes are not kept apart. Independent."""
        if observers:
            raise ValueError(f"{type(self).__name__} adds lanes as they come: they cannot be looked at one by one")

    def discard(self) -> None:
        """Forget the gradients of the step that has begun. Independent."""
        self._fresh = True

    def has_free_slot(self) -> bool:
        """Is there room for one more lane, whichever it is? Independent."""
        return True

    def overlaps(self) -> bool:
        """May reductions begin in this step before finish? Independent."""
        return self.worker is not None

    def begin(self, bucket: Bucket) -> None:
        """The rank's own gradients of this bucket are complete: its reduction starts. Independent."""
        assert self.worker is not None
        self.worker.submit(bucket)

    def finish(self) -> None:
        """buffer.total now holds the sum. Collective over all ranks."""
        with self.transport.timed():
            if self.worker is not None:
                for bucket in self.worker.missing():
                    self.begin(bucket)
                self.worker.wait()
            else:
                for bucket in self.buffer.buckets:
                    self.turn(bucket)
        self._fresh = True
        self.buffer.point(0)

    def turn(self, bucket: Bucket) -> None:
        """Reduce one bucket, seen by the observers. Collective over all ranks."""
        with self._seen(bucket):
            self.reduce(bucket)

    def _seen(self, bucket: Bucket) -> AbstractContextManager[Any]:
        self.observers.reducing(bucket.index)
        return self.observers.span(f"bucket {bucket.index}", bytes=4 * (bucket.stop - bucket.start))

    def reduce(self, bucket: Bucket) -> None:
        """Sum one bucket. Collective over all ranks."""
        raise NotImplementedError

    def norm(self) -> float:
        """L2 norm of the sum, from squares of fixed blocks added in order: the same bits whoever computes which blocks.
        Collective over the group."""
        total, mine = self.buffer.total, self.group.slice_of(self.buffer.num_elements)
        squares = torch.zeros(total.numel() // NORM_BLOCK, dtype=torch.float64)
        if mine.start < mine.stop:
            squares[mine.start // NORM_BLOCK : mine.stop // NORM_BLOCK] = squares_of_blocks(total[mine]).cpu()
        if self.group.node.size > 1:
            with self.transport.timed():
                self.group.wait(self.group.node.Iallreduce(MPI.IN_PLACE, buf(squares)))
        if self._over_parts is None:
            return math.sqrt(squares.cumsum(0)[-1])
        norm = self._over_parts(self.buffer, squares, total)
        self.group.fence()  # it has read all of the sum, which others are about to scale
        return norm

    def norm_of(self, flat: torch.Tensor) -> float:
        """L2 norm of any flat gradient that this rank holds, (num_elements,). Independent, but where the model is cut: then
        collective over the ranks that have its parts."""
        squares = squares_of_blocks(flat).cpu()
        return math.sqrt(squares.cumsum(0)[-1]) if self._over_parts is None else self._over_parts(self.buffer, squares, flat)

    def scale(self, factor: float) -> None:
        """Multiply the sum. Collective over the group."""
        if factor != 1.0 and self.holds_sum:
            self.buffer.total[self.group.slice_of(self.buffer.num_elements)].mul_(factor)
            self.group.fence()

    def publish(self, tensors: Iterable[torch.Tensor]) -> None:
        """What the ranks that updated wrote is everybody's from here on. Collective over all ranks."""
        with self.transport.timed():
            self.group.fence()

    def end_round(self, applied: bool) -> None:
        """The sums since this was last called went into an update, or are as if they had not been. The same on all ranks.
        Independent."""

    def state_dict(self) -> dict[str, Entry]:
        """What it goes on with besides the gradients of a step: copies. Independent."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on with that; from the beginning without. Independent."""
        if "residual" in state and self.comm.rank == 0:
            log.info("comm.compress was turned off: the stored compression error is dropped")

    def resume_from(self, before: Reducer | None) -> None:
        """Where another one of the same kind stood, of whose ranks these are left; None: this rank is new, and not rank 0.
        Collective over all ranks."""


class FlatReducer(Reducer):
    """A reducer of one buffer a rank that can as well sum any other flat tensor of the same layout: what strategies that average
    at another rhythm need. Whoever sums every bucket once says afterwards what became of it: end_round()."""

    def reduce(self, bucket: Bucket) -> None:
        self.sum(self.buffer.flat[0], bucket)

    def turn_of(self, flat: torch.Tensor, bucket: Bucket) -> None:
        """sum(), seen by the observers. Collective over all ranks."""
        with self._seen(bucket):
            self.sum(flat, bucket)

    def sum(self, flat: torch.Tensor, bucket: Bucket) -> None:
        """Sum over the ranks, in place, what flat (num_elements,) holds of this bucket. Collective over all ranks."""
        raise NotImplementedError


class Allreduce(FlatReducer):
    """The sum of MPI or of NCCL, in pieces."""

    own_order = False

    def sum(self, flat: torch.Tensor, bucket: Bucket) -> None:
        if self.comm.size > 1:
            for start, stop in pieces(bucket.start, bucket.stop):
                self._sum(flat[start:stop])

    def _sum(self, piece: torch.Tensor) -> None:
        wire = self.transport.load(piece, "allreduce")
        self.transport.allreduce(self.comm, self.wait, wire, blocking=self.wait is spin and self.group.all_spin)
        self.transport.store(wire, piece)


class Naive(Allreduce):
    """One Allreduce a parameter: the form that everybody can check by eye."""

    def sum(self, flat: torch.Tensor, bucket: Bucket) -> None:
        for shape, offset in zip(bucket.shapes, bucket.offsets, strict=True):
            self._sum(flat[offset : offset + shape.numel()])


class Root(Reducer):
    """Gather to rank 0, which adds in rank order, updates, and broadcasts the parameters."""

    everyone_updates = False

    def __init__(
        self, group: Group, lanes: Lanes, transport: Messages, shares: LaneShares, num_slots: int = 1, **more: Any
    ) -> None:
        super().__init__(group, lanes, transport, shares, num_slots, **more)
        self.holds_sum = self.comm.rank == 0

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

    def norm(self) -> float:
        found = torch.tensor([super().norm()], dtype=torch.float64)
        self.comm.Bcast(buf(found), root=0)
        return float(found)

    def publish(self, tensors: Iterable[torch.Tensor]) -> None:
        with self.transport.timed():
            for tensor in tensors:
                wire = self.transport.load(tensor.detach().view(-1), "publish")
                self.comm.Bcast(buf(wire), root=0)
                self.transport.store(wire, tensor.detach().view(-1))
                self.transport.sent_bytes += wire.nbytes if self.holds_sum else 0

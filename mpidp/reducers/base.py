"""Reducers sum the gradients over the ranks. This module has the base class of reducers and the simplest reducers. A lane is a
fixed sequence of micro-batches whose gradients one rank accumulates in order. A slice is a contiguous range of the flat
gradient. Its owner is the rank that adds the slice.

| name | sum | bits depend on | use |
|---|---|---|---|
| tree | owners of slices add lanes in the order of a fixed binary tree (tree.py) | the lanes only | default |
| allreduce | MPI_Allreduce (or NCCL's), in pieces | ranks, MPI library, shared cores | fewest bytes if lanes are uneven |
| naive | one MPI_Allreduce per parameter | ranks, MPI library, shared cores | reference implementation of allreduce |
| root | rank 0 gathers, adds, updates, and broadcasts the parameters | ranks | reference implementation |

"Shared cores" means that the bits depend on whether several ranks share a core. Lanes are uneven if the lanes of a rank are not a
complete subtree of the tree over lanes. With `tree`, the rank then sends several partial sums. The reducers of comm.compress send
fewer bytes (compression/compressed.py). Tests compare other reducers with the simple, slow reference implementations.

After finish(), `buffer.total` holds the sum over all lanes of the global batch, on every rank. With `root`, only rank 0 holds the
sum and updates the parameters. publish() then broadcasts the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from mpi4py import MPI

from mpidp.checkpoint.entry import Entry
from mpidp.comm.buffers import buf, datatype, memory
from mpidp.comm.group import Group
from mpidp.comm.slices import NORM_BLOCK, norm_of_squares, squares_of_blocks
from mpidp.comm.transport import Messages, pieces
from mpidp.comm.waiting import Wait, spin
from mpidp.data.lanes import Lanes
from mpidp.reducers.buckets import Bucket, GradientBuffer
from mpidp.runtime.log import log
from mpidp.runtime.observers import NO_OBSERVERS, StepObservers


class LaneShares(Protocol):
    """The lanes (fixed sequences of micro-batches) that each rank computes in this step (training/balance.py)."""

    ranges: list[range]
    static: bool  # whether ranges are fixed before the step; otherwise a rank may take lanes of other ranks of its node


class BucketWorker(Protocol):
    """A thread that reduces buckets (consecutive parameters) in a fixed order (overlap.py)."""

    def submit(self, bucket: Bucket) -> None:
        """Queue a bucket whose gradients on this rank are complete. Independent."""

    def missing(self) -> list[Bucket]:
        """Return the buckets that were not submitted in this step. Independent."""

    def wait(self) -> None:
        """Wait until all buckets are reduced. Collective over the ranks that reduce."""

    def close(self) -> None:
        """Stop the thread. Independent."""


NormOverParts = Callable[[GradientBuffer, torch.Tensor, torch.Tensor], float]  # (buffer, squares of blocks, gradient) -> norm
LaneObserver = Callable[[int, torch.Tensor], None]  # called with (lane, flat gradient of the lane) before lanes are added


class Reducer:
    """Base class of reducers. A reducer of this class accumulates all micro-batches of the rank in one gradient buffer."""

    everyone_updates = True  # whether all ranks update the parameters, or only rank 0
    own_order = True  # whether blocking and non-blocking calls add in the same order; with MPI's reductions, they may not

    def __init__(
        self, group: Group, lanes: Lanes, transport: Messages, shares: LaneShares, num_slots: int = 1, *,
        observers: StepObservers = NO_OBSERVERS, norm_over_parts: NormOverParts | None = None,
    ) -> None:
        """num_slots: number of gradient buffers (slots) of the rank. norm_over_parts: computes the norm over the whole model.
        It is None if this rank has the whole model. Independent."""
        self.group, self.lanes, self.transport, self.shares, self.num_slots = group, lanes, transport, shares, num_slots
        self.observers, self._norm_over_parts = observers, norm_over_parts
        self.comm = group.rail
        self.wait = group.wait  # how to wait for requests in a reduction
        self.worker: BucketWorker | None = None  # reduces during backward (overlap.py)
        self.overlap_mode = "none"  # a key of OVERLAP_WAITS
        self.holds_sum = True  # whether this rank holds the sum after finish()
        self.buffer: GradientBuffer
        self._fresh = True

    def attach(self, buffer: GradientBuffer) -> None:
        """Set the gradient buffer. `buffer` must have at least num_slots slots. Independent."""
        self.buffer = buffer

    def set_wait(self, wait: Wait | None) -> None:
        """Set the function that waits for MPI requests in a reduction. If `wait` is None, use group.wait, which also waits for
        the group's other requests. Call set_wait() between steps. Independent."""
        self.wait = wait or self.group.wait

    def set_overlap(self, mode: str, wait: Wait | None, worker: BucketWorker | None) -> None:
        """Set the worker that reduces buckets during backward. If `worker` is None, reductions do not overlap with backward.
        mode: a key of OVERLAP_WAITS (overlap.py). wait: see set_wait(). Call set_overlap() between steps. Independent."""
        self.stop_worker()
        self.overlap_mode, self.worker = mode, worker
        self.set_wait(wait)

    def stop_worker(self) -> None:
        """Stop the thread that reduces buckets, if there is one. Independent."""
        if self.worker is not None:
            self.worker.close()

    def open(self, v: int, last: bool = False, chunk: int = 0) -> None:
        """Begin micro-batch `v` for chunk `chunk` (a group of layers): make the .grad of each parameter of the chunk a view of
        the slot (gradient buffer) in which the gradient of `v` accumulates. last: whether `v` is the rank's last micro-batch of
        the step. Independent."""
        self.buffer.point(0)
        if self._fresh:
            self.buffer.flat[0].zero_()
            self._fresh = False

    def close(self, v: int, chunk: int = 0) -> None:
        """End micro-batch `v` for chunk `chunk`, after its backward pass. Independent."""

    def observe_lanes(self, observers: Sequence[LaneObserver]) -> None:
        """During the next step, call each observer with the gradient of every lane (sequence of micro-batches). Raises
        ValueError if the reducer does not store the gradients of single lanes. Independent."""
        if observers:
            raise ValueError(
                f"{type(self).__name__} adds all micro-batches in one buffer, so the gradients of "
                "single lanes cannot be observed. Set comm.reducer=tree"
            )

    def discard(self) -> None:
        """Discard the gradients of the current step. Independent."""
        self._fresh = True

    def has_free_slot(self) -> bool:
        """Return whether a slot (gradient buffer) is free for one more lane. Independent."""
        return True

    def overlaps(self) -> bool:
        """Return whether reductions may begin before finish() in this step. Independent."""
        return self.worker is not None

    def begin(self, bucket: Bucket) -> None:
        """Start the reduction of a bucket whose gradients on this rank are complete. Independent."""
        assert self.worker is not None
        self.worker.submit(bucket)

    def finish(self) -> None:
        """Finish the sum of this step. Afterwards buffer.total holds the sum on every rank whose holds_sum is True. Collective
        over all ranks."""
        with self.transport.timed():
            if self.worker is not None:
                for bucket in self.worker.missing():
                    self.begin(bucket)
                self.worker.wait()
            else:
                for bucket in self.buffer.buckets:
                    self.reduce_observed(bucket)
        self._fresh = True
        self.buffer.point(0)

    def reduce_observed(self, bucket: Bucket) -> None:
        """Call reduce(), and report the reduction to the observers. Collective over all ranks."""
        with self._observed(bucket):
            self.reduce(bucket)

    def _observed(self, bucket: Bucket) -> AbstractContextManager[Any]:
        self.observers.reducing(bucket.index)
        return self.observers.span(f"bucket {bucket.index}", bytes=4 * (bucket.stop - bucket.start))

    def reduce(self, bucket: Bucket) -> None:
        """Sum one bucket over the ranks. Collective over all ranks."""
        raise NotImplementedError

    def norm(self) -> float:
        """Return the L2 norm of the sum. The sums of squares of norm blocks (4,096 consecutive elements) are added in a fixed
        order, so the bits of the norm do not depend on the number of ranks. Collective over all ranks."""
        total, mine = self.buffer.total, self.group.slice_of(self.buffer.num_elements)
        squares = torch.zeros(total.numel() // NORM_BLOCK, dtype=torch.float64)
        if mine.start < mine.stop:
            squares[mine.start // NORM_BLOCK : mine.stop // NORM_BLOCK] = squares_of_blocks(total[mine]).cpu()
        if self.group.node.size > 1:
            with self.transport.timed():
                self.group.wait(self.group.node.Iallreduce(MPI.IN_PLACE, buf(squares)))
        if self._norm_over_parts is None:
            return norm_of_squares(squares)
        norm = self._norm_over_parts(self.buffer, squares, total)
        self.group.fence()  # all ranks have read the sum before any rank scales it
        return norm

    def norm_of(self, flat: torch.Tensor) -> float:
        """Return the L2 norm of `flat`, a flat gradient (num_elements,) of this rank. With mesh.tp or mesh.pp, return the norm
        over the whole model. The call is then collective over the ranks that hold the model's parts. Otherwise independent."""
        squares = squares_of_blocks(flat).cpu()
        if self._norm_over_parts is None:
            return norm_of_squares(squares)
        return self._norm_over_parts(self.buffer, squares, flat)

    def scale(self, factor: float) -> None:
        """Multiply the sum by `factor`. Collective over the group."""
        if factor != 1.0 and self.holds_sum:
            self.buffer.total[self.group.slice_of(self.buffer.num_elements)].mul_(factor)
            self.group.fence()

    def publish(self, tensors: Iterable[torch.Tensor]) -> None:
        """Make the updated parameters visible on all ranks. tensors: the parameters. Collective over all ranks."""
        with self.transport.timed():
            self.group.fence()

    def end_round(self, applied: bool) -> None:
        """End a round. The round consists of the sums since the last call. applied: whether an update used these sums. If not,
        the reducer restores the state that it had before the round. No communication, but all ranks must call end_round() with
        the same value."""

    def state_dict(self) -> dict[str, Entry]:
        """Return copies of the state that a resumed run needs. This base class has no such state. Independent."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load the state that state_dict() returned. An empty state resets the reducer. Independent."""
        if "residual" in state and self.comm.rank == 0:
            log.info("comm.compress was turned off, so the compression error in the checkpoint is dropped")

    def resume_from(self, before: Reducer | None) -> None:
        """Take over the state of `before`, the reducer that this rank had before ranks failed. `before` is None on ranks that
        joined after the failure, and never None on rank 0. Collective over all ranks."""


class FlatReducer(Reducer):
    """A reducer with one gradient buffer per rank. For strategies that do not sum gradients at every step, it can also sum other
    flat tensors of the same layout. Call end_round() when every bucket (group of parameters) has been summed once."""

    def reduce(self, bucket: Bucket) -> None:
        self.sum(self.buffer.flat[0], bucket)

    def sum_observed(self, flat: torch.Tensor, bucket: Bucket) -> None:
        """Call sum(), and report the reduction to the observers. Collective over all ranks."""
        with self._observed(bucket):
            self.sum(flat, bucket)

    def sum(self, flat: torch.Tensor, bucket: Bucket) -> None:
        """Replace the elements of `bucket` in `flat`, (num_elements,), by their sum over the ranks. Collective over all ranks."""
        raise NotImplementedError


class Allreduce(FlatReducer):
    """Implements comm.reducer=allreduce with MPI's or NCCL's allreduce, in pieces."""

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
    """Implements comm.reducer=naive with one Allreduce per parameter. This reference implementation is simple enough to verify by
    reading."""

    def sum(self, flat: torch.Tensor, bucket: Bucket) -> None:
        for shape, offset in zip(bucket.shapes, bucket.offsets, strict=True):
            self._sum(flat[offset : offset + shape.numel()])


class Root(Reducer):
    """Implements comm.reducer=root. Rank 0 gathers the gradients, adds them in order of ranks, updates the parameters and
    broadcasts them. This is a reference implementation."""

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
                self.comm.Gather(buf(wire), [memory(gathered), wire.numel(), datatype(gathered)], root=0)  # the count is per rank
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

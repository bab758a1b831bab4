"""Delayed updates: gradients are summed in a thread while the next batches are computed, and are applied k steps late.

In step s, a rank passes its gradient of batch s to a thread, which sums the gradient over the ranks. In the same step the rank
applies the sum of batch s - k. The gradients in this sum were computed with the parameters before the last k updates
(staleness k). All ranks apply the same sums in the same order, so replicas stay equal. The first k steps make no update.
drain() applies the remaining sums. With k = 0, this strategy is the same as `synchronous` with a reducer that has one buffer.

Delay compensation estimates the gradient at the current parameters theta from the late gradient g. The estimate is g + lambda g *
g * (theta - theta_then), where theta_then are the parameters with which g was computed. See Zheng 2017, "Asynchronous Stochastic
Gradient Descent with Delay Compensation", eq. 10.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.checkpoint.entry import Entry
from mpidp.comm.background import Background, Task
from mpidp.comm.buffers import buf
from mpidp.reducers.base import FlatReducer
from mpidp.reducers.overlap import OVERLAP_WAITS
from mpidp.strategies.protocol import StepStats, StrategyOptions
from mpidp.strategies.synchronous import Synchronous


@dataclass
class PendingUpdate:
    """A batch whose gradient is in flight: the gradient has not been applied yet."""

    slot: int  # index of the gradient buffer of the batch
    tokens: Tensor  # (1,) float64: number of target tokens of this rank; after the sum, of all ranks
    limit: float  # largest gradient norm that is applied
    then: Tensor | None = None  # the parameters with which the gradient was computed, for delay compensation
    task: Task | None = None  # the task that sums the gradient; None when the sum is complete

    def wait(self) -> None:
        """Wait until the gradient is summed. Collective over compute_comm."""
        if self.task is not None:
            self.task.wait()
            self.task = None


class Delayed(Synchronous):
    """Implements delayed updates with a delay of k steps. The gradient buffer consists of slots, each of which holds one flat
    gradient. Slot 0 holds the sum that is applied. The other k + 1 slots hold the gradient of the current batch, and the
    gradients of k batches that have not been applied yet."""

    survives_failures = False
    synchronizes_always = False

    def __init__(self, *parts: Any, **more: Any) -> None:
        """Take the arguments of Synchronous. The reducer must be a FlatReducer. Collective over comm."""
        super().__init__(*parts, **more)
        assert isinstance(self.reducer, FlatReducer)
        self._flat_reducer = self.reducer
        self._flat_reducer.set_wait(OVERLAP_WAITS["poll"])  # sums run in a thread, which must leave the core to backward
        self._background = Background()
        self._in_flight: deque[PendingUpdate] = deque()
        self._slot, self._fresh, self._lr = 1, True, 0.0

    def more_slots(self, options: StrategyOptions) -> int:
        """Return staleness + 1: one gradient buffer (slot) for the current batch, and one for each batch that is not applied
        yet. Independent."""
        return options.staleness + 1

    @contextmanager
    def micro_batch(self, v: int, last: bool, chunk: int = 0) -> Iterator[None]:
        """Return a context manager, in which the backward pass of micro-batch number `v` must run. `last`, `chunk`: see
        Synchronous. Independent."""
        if self._fresh:
            self.buffer.flat[self._slot].zero_()
            self._fresh = False
        self.buffer.point(self._slot)
        yield

    def discard(self) -> None:
        """Discard the gradient of the current step. Independent."""
        self._fresh = True

    def step(self, lr: float, tokens: int, limit: float = math.inf) -> StepStats:
        """Start to sum the gradient of this batch. Then apply the sum that was started k steps ago, and return the norm of
        this sum in the StepStats. `tokens`: number of target tokens in this rank's micro-batches. Collective over
        compute_comm."""
        self.reducer.observers.enter("reduce")
        if self._fresh:  # this rank computed no lane
            self.buffer.flat[self._slot].zero_()
        then = self.flat.clone() if self.options.compensation else None
        pending = PendingUpdate(self._slot, torch.tensor([float(tokens)], dtype=torch.float64), limit, then)
        pending.task = self._background.submit(partial(self._sum, pending))
        self._in_flight.append(pending)
        self._slot, self._fresh, self._lr = self._slot % (self.options.staleness + 1) + 1, True, lr
        if len(self._in_flight) <= self.options.staleness:
            return StepStats(grad_norm=0.0, skipped=False)
        return self._apply(lr, self._in_flight.popleft())

    def _sum(self, pending: PendingUpdate) -> None:
        """Sum the gradient of a batch over the ranks. The thread runs this method. Collective over compute_comm."""
        self._flat_reducer.wait(self._flat_reducer.comm.Iallreduce(MPI.IN_PLACE, buf(pending.tokens)))
        for bucket in self.buffer.buckets:
            self._flat_reducer.sum_observed(self.buffer.flat[pending.slot], bucket)
        self._flat_reducer.end_round(applied=True)  # never undone: residuals contain only finite values

    def _apply(self, lr: float, pending: PendingUpdate) -> StepStats:
        with self.reducer.transport.timed():
            pending.wait()
        self.reducer.observers.enter("apply")
        total, tokens = self.buffer.total, float(pending.tokens)
        torch.mul(self.buffer.flat[pending.slot], self.nominal_tokens / max(1.0, tokens), out=total)
        if pending.then is not None:
            total.addcmul_(total * total, self.flat - pending.then, value=self.options.compensation)
        norm = self.reducer.norm_of(total)
        if not (tokens and math.isfinite(norm) and norm <= pending.limit):
            return StepStats(grad_norm=norm, skipped=True)
        if self.clip and norm > self.clip:
            total.mul_(self.clip / norm)
        assert self.optimizer is not None
        self.optimizer.step(lr)
        return StepStats(grad_norm=norm, skipped=False)

    def drain(self) -> None:
        """Apply the remaining sums. Collective over compute_comm."""
        while self._in_flight:
            self._apply(self._lr, self._in_flight.popleft())

    def state_dict(self) -> dict[str, Entry]:
        """Wait until all sums that have been started are complete. Return the state, including these sums, so that a resumed
        run applies them. This method starts no communication, but all ranks must call it at the same step."""
        for pending in self._in_flight:
            pending.wait()
        found = super().state_dict()
        for i, pending in enumerate(self._in_flight):
            parts = {"gradient": self.buffer.flat[pending.slot], "tokens": pending.tokens,
                     "limit": torch.tensor([pending.limit], dtype=torch.float64),
                     "lr": torch.tensor([self._lr], dtype=torch.float64)}
            parts |= {} if pending.then is None else {"then": pending.then}
            found |= {f"in_flight/{i}/{key}": Entry(tensor) for key, tensor in parts.items()}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state, including the sums that had not been applied. Independent."""
        late = {name: value for name, value in state.items() if name.startswith("in_flight/")}
        super().load_state_dict({name: value for name, value in state.items() if name not in late})
        self._in_flight.clear()
        for i in range(len({name.split("/")[1] for name in late})):
            of = {name.rpartition("/")[2]: value for name, value in late.items() if name.startswith(f"in_flight/{i}/")}
            self.buffer.flat[self._slot].copy_(of["gradient"])
            then = of["then"].to(self.flat.device) if "then" in of else None
            self._in_flight.append(PendingUpdate(self._slot, of["tokens"].clone(), float(of["limit"]), then))
            self._slot = self._slot % (self.options.staleness + 1) + 1
            self._lr = float(of.get("lr", torch.zeros(1)))  # earlier versions did not save it

    def release(self) -> None:
        """Release the parameters, and drop the sums that have not been applied. Independent."""
        super().release()
        self._in_flight.clear()

    def close(self) -> None:
        """Stop the thread and free the memory. Collective over compute_comm."""
        self._background.close()
        super().close()

"""Training with a quorum: an update is made when a given fraction of the gradients has arrived. Late gradients are added to a
later update, so no gradient is dropped.

Every rank computes its gradient of batch i with the parameters theta_i, and contributes this gradient. Round i sums the
contributions that have arrived when the round closes (quorum_rounds.py). Every rank divides the sum by the number of target
tokens in the round, and makes the update from theta_i to theta_{i+1}. A rank that is late with batch i makes the same update,
and continues with batch i + 1. Therefore replicas are equal at the same step. The late gradient is added to a later round, at
most `staleness` rounds later. At a meeting (a step at which all ranks synchronize), all contributions have arrived. Therefore
no contribution is missing at a checkpoint, at an evaluation or at the end of the run.

This strategy combines the majority collective of Eager-SGD with the bounded staleness of SSP. See Li 2020, "Taming unbalanced
training workloads in deep learning with partial collective operations", section 4, and Ho 2013, section 3. A thread of rank 0
receives notices of contributions. It tells the threads of all ranks which contributions join each round. Then all threads take
part in the sum. A rank without a contribution adds zeros.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.checkpoint.entry import Entry
from mpidp.comm.background import Background
from mpidp.comm.slices import global_norm
from mpidp.errors import UsageError
from mpidp.reducers.base import FlatReducer
from mpidp.reducers.overlap import OVERLAP_WAITS
from mpidp.strategies.protocol import StepStats, StrategyOptions
from mpidp.strategies.quorum_rounds import RoundTracker
from mpidp.strategies.synchronous import Synchronous

# Tags of MPI messages. GIVEN: notice of a contribution, sent to rank 0. CLOSED: the contributions of a closed round, sent by rank
# 0. Both messages have float64 values: the number of target tokens, and whether ranks synchronize at this batch. CLOSED messages
# also have the number of contributions of each rank.
GIVEN, CLOSED = range(2)
FIRST_SECONDS, LONGEST_SECONDS = 5e-5, 5e-4  # shortest and longest pause between two polls; pauses grow while no message arrives


@dataclass(frozen=True)
class Round:
    """A round (one sum of the contributions that have arrived) whose sum is complete."""

    slot: int  # index of the gradient buffer with the sum
    tokens: float  # target tokens in the sum
    joined: list[int]  # number of contributions of each rank in the sum


class Quorum(Synchronous):
    """Implements training with a quorum. The gradient buffer consists of slots, each of which holds one flat gradient. Slot 0
    holds the gradient of the update. Another slot accumulates the gradient of the current batch. The other `staleness` slots
    hold gradients that have not been applied yet."""

    survives_failures = False
    synchronizes_always = False

    def __init__(self, *parts: Any, **more: Any) -> None:
        """Take the arguments of Synchronous. The reducer must be a FlatReducer. Raises UsageError if there are several ranks and
        the MPI library does not support calls from several threads. Collective over comm."""
        super().__init__(*parts, **more)
        self._alone = self.compute_comm.size == 1  # one rank needs no thread
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE and not self._alone:
            raise UsageError.on_every_rank(
                "with strategy.quorum below 1, a second thread sums gradients, but this MPI library does not support calls from "
                "several threads (MPI_THREAD_MULTIPLE). Use another build of MPI, or strategy.quorum=1"
            )
        assert isinstance(self.reducer, FlatReducer)
        self._flat_reducer, self._comm = self.reducer, self.reducer.comm
        self._flat_reducer.set_wait(OVERLAP_WAITS["poll"])  # sums run in a thread, which must leave the core to backward
        self._lanes = [len(lanes) for lanes in self._flat_reducer.shares.ranges]
        self._needed = max(1, math.ceil(self.options.quorum * sum(self._lanes) - 1e-9))  # in floating point, 0.1 x 30 exceeds 3
        self._free = deque(range(1, self.options.staleness + 2))
        self._slot = 0  # the slot of the current batch; 0: no slot so far
        self._steps = 0
        self._joined: list[list[int]] = []  # number of contributions of each rank in each round since the last meeting
        self._background = Background()
        self._serving = self._closing = False  # whether the thread runs _serve(); whether the thread must end
        self._tracker: RoundTracker  # tracks the rounds since the last meeting
        self._given: SimpleQueue[tuple[int, float, bool]] = SimpleQueue()  # to the thread: (slot, target tokens, synchronizes)
        self._summed: SimpleQueue[Round | BaseException] = SimpleQueue()  # from the thread
        # Used by the thread only:
        self._waiting: deque[int] = deque()  # slots of this rank's contributions that have not joined a round
        self._sends: list[tuple[MPI.Request, np.ndarray]] = []
        self._notices, self._received = 0, [0] * len(self._lanes)  # notices sent to rank 0; received by rank 0 from each rank

    def more_slots(self, options: StrategyOptions) -> int:
        """Return staleness + 1: the number of gradient buffers (slots) in addition to slot 0. Independent."""
        return options.staleness + 1

    def start(self) -> None:
        """Prepare for the first step. In a replay, raises UsageError if the ranks of the replayed run synchronized at other
        steps. Collective over compute_comm."""
        super().start()
        order, last = self.options.arrivals, self.options.total_steps
        missing = [step for step in range(1, last + 1) if order and self.synchronizes_at(step) and step not in order]
        if missing:
            raise UsageError.on_every_rank(
                f"strategy.replay: the replayed run did not synchronize at step {missing[0]}, but this run does. Set "
                "strategy.meet_every and train.steps as in that run"
            )

    @contextmanager
    def micro_batch(self, v: int, last: bool, chunk: int = 0) -> Iterator[None]:
        """Return a context manager, in which the backward pass of micro-batch number `v` must run. `last`, `chunk`: see
        Synchronous. Independent."""
        self._begin()
        self.buffer.point(self._slot)
        yield

    def _begin(self) -> None:
        """Choose a slot for the current batch. After a meeting, start the thread."""
        if not self._serving:
            next_sync = min((step for step in self.options.arrivals if step > self._steps), default=0)
            order = self.options.arrivals[next_sync][len(self._joined) :] if next_sync else None
            self._tracker = RoundTracker(self._lanes, self._needed, self.options.staleness, order)
            self._serving = True
            if not self._alone:
                self._background.submit(partial(self._serve, self._tracker))
        if not self._slot:
            self._slot = self._free.popleft()
            self.buffer.flat[self._slot].zero_()

    def discard(self) -> None:
        """Discard the gradient of the current step. Independent."""
        if self._slot:
            self.buffer.flat[self._slot].zero_()

    def step(self, lr: float, tokens: int, limit: float = math.inf) -> StepStats:
        """Contribute this rank's gradient of the batch. Wait until the round of this batch (the sum of the contributions that
        have arrived) is complete, and make the update. `tokens`: number of target tokens in this rank's micro-batches.
        Collective over compute_comm at a meeting (a step at which all ranks synchronize). At other steps, a rank waits only
        for the contributions that the quorum requires."""
        self.reducer.observers.enter("reduce")
        self._begin()  # needed if this rank had no lane to compute
        synchronizes = self.synchronizes_at(self._steps + 1)
        self._given.put((self._slot, tokens, synchronizes))
        self._slot = 0
        if self._alone:
            self._turn(self._tracker)
        with self.reducer.transport.timed():
            found = self._summed.get()
        if isinstance(found, BaseException):
            raise found
        self.reducer.observers.enter("apply")
        stats = self._apply(lr, found, limit)
        self._steps += not stats.skipped
        self._joined.append(found.joined)
        if not synchronizes:
            return stats
        self._serving = False
        return stats if stats.skipped else replace(stats, extra=self._round_report())

    def _apply(self, lr: float, found: Round, limit: float) -> StepStats:
        gradient, scale, norm = self.buffer.flat[found.slot], self.nominal_tokens / max(1.0, found.tokens), 0.0
        if found.tokens:
            norm = global_norm(gradient) * scale
            if self.clip and norm > self.clip:
                scale *= self.clip / norm
        skipped = not (found.tokens and math.isfinite(norm) and norm <= limit)
        if not skipped:
            torch.mul(gradient, scale, out=self.buffer.total)
            assert self.optimizer is not None
            self.optimizer.step(lr)
        self._free.append(found.slot)
        return StepStats(grad_norm=norm, skipped=skipped)

    def _round_report(self) -> dict[str, Any]:
        """Return fields for metrics.jsonl: the order in which contributions have arrived since the last meeting, and how many
        lanes (sequences of micro-batches) were late. The result is the same on every rank."""
        late, had = 0, [0] * len(self._lanes)
        for batch, joined in enumerate(self._joined):
            for rank, count in enumerate(joined):
                late += self._lanes[rank] * max(0, min(count, batch - had[rank]))
                had[rank] += count
        arrivals = [[rank for rank, count in enumerate(joined) for _ in range(count)] for joined in self._joined]
        self._joined = []
        return {"arrivals": arrivals, "late_lanes": late}

    # The thread

    def _serve(self, tracker: RoundTracker) -> None:
        """Sum all rounds from one meeting (step at which all ranks synchronize) to the next. The thread runs this method.
        Collective over compute_comm."""
        pause = FIRST_SECONDS
        try:
            while not self._closing:
                if (synchronized := self._turn(tracker)) is None:
                    time.sleep(pause)
                    pause = min(LONGEST_SECONDS, 1.5 * pause)
                elif synchronized:
                    break
                else:
                    pause = FIRST_SECONDS
            while self._sends and not self._closing:
                self._flat_reducer.wait(self._sends.pop()[0])
        except BaseException as error:  # step() raises the error in the main thread; here it would be lost
            self._summed.put(error)

    def _turn(self, tracker: RoundTracker) -> bool | None:
        """Send and receive notices of contributions. If the next round has closed, sum its contributions, and return whether
        all ranks synchronize in this round. Return None if the round has not closed."""
        if (row := self._closed(tracker)) is None:
            return None
        self._sum(row[0], [int(count) for count in row[2:]])
        return bool(row[1])

    def _closed(self, tracker: RoundTracker) -> np.ndarray | None:
        self._sends = [one for one in self._sends if not one[0].Test()]
        while not self._given.empty():
            slot, tokens, synchronizes = self._given.get()
            self._waiting.append(slot)
            self._notices += 1
            if self._comm.rank:
                self._send(np.array([tokens, synchronizes], dtype=np.float64), 0, GIVEN)
            else:
                self._record(tracker, 0, tokens, synchronizes)
        row = np.zeros(2 + self._comm.size)
        if self._comm.rank:
            if not self._comm.Iprobe(0, CLOSED):
                return None
            self._comm.Recv(row, 0, CLOSED)
            return row
        status = MPI.Status()
        while not self._alone and self._comm.Iprobe(MPI.ANY_SOURCE, GIVEN, status):
            self._comm.Recv(row[:2], status.Get_source(), GIVEN)
            self._record(tracker, status.Get_source(), row[0], bool(row[1]))
        if (closed := tracker.close_round()) is None:
            return None
        joined, tokens, synchronizes = closed
        row[:] = [tokens, synchronizes, *joined]
        for rank in range(1, self._comm.size):
            self._send(row, rank, CLOSED)
        return row

    def _record(self, tracker: RoundTracker, rank: int, tokens: float, synchronizes: bool) -> None:
        self._received[rank] += 1
        tracker.add(rank, tokens, synchronizes)

    def _send(self, row: np.ndarray, rank: int, tag: int) -> None:
        self._sends.append((self._comm.Isend(row, rank, tag), row))

    def _sum(self, tokens: float, joined: list[int]) -> None:
        """Sum the contributions of the next round. `tokens`: the number of target tokens in the round. `joined`: the number of
        contributions of each rank. Collective over compute_comm."""
        slots = [self._waiting.popleft() for _ in range(joined[self._comm.rank])]
        slot = slots.pop(0) if slots else self._free.popleft()
        flat = self.buffer.flat[slot]
        if not joined[self._comm.rank]:
            flat.zero_()
        for other in slots:
            flat += self.buffer.flat[other]
            self._free.append(other)
        for bucket in self.buffer.buckets:
            self._flat_reducer.sum_observed(flat, bucket)
        self._flat_reducer.end_round(applied=True)  # residuals contain finite values only
        self._summed.put(Round(slot, tokens, joined))

    # Checkpoints and the end

    def state_dict(self) -> dict[str, Entry]:
        """Return the state. Call this method only after a step at which all ranks synchronize (a meeting). Then every
        contribution has been added to an update. Independent."""
        found = super().state_dict() | {"steps": Entry(torch.tensor([self._steps]))}
        return found | ({"joined": Entry(torch.tensor(self._joined))} if self._joined else {})  # if the last batch was skipped

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state. Raises UsageError if a run without a quorum saved the state. Independent."""
        own = {name: state[name] for name in ("steps", "joined") if name in state}
        if "steps" not in own:
            raise UsageError("strategy.quorum is below 1, but the checkpoint is of a run without a quorum. Use strategy.quorum=1")
        super().load_state_dict({name: value for name, value in state.items() if name not in own})
        joined = own.get("joined", torch.zeros(0, 0)).tolist()
        self._steps, self._joined = int(own["steps"]), [row for row in joined if len(row) == len(self._lanes)]

    def release(self) -> None:
        """Release the parameters, and end the thread. Independent."""
        super().release()
        self._closing = True

    def close(self) -> None:
        """Stop the thread. Rank 0 then receives the remaining notices of contributions. If a round is in progress, all ranks
        must have contributed the gradients of the same number of batches. Collective over compute_comm."""
        self._closing = True
        self._background.close()
        sent = self.compute_comm.allgather(self._notices)
        for rank in range(1, len(sent)) if self._comm.rank == 0 else ():
            for _ in range(sent[rank] - self._received[rank]):
                self._comm.Recv(np.zeros(2), rank, GIVEN)
        for request, _ in self._sends:
            request.Wait()
        super().close()

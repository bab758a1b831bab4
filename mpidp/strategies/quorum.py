"""A quorum: a step goes on when part of the lanes has arrived, and who is late joins the next one; nothing is dropped.

Every rank computes its lanes of batch i at theta_i and contributes the gradient. Round i sums what has come (roll.py says when
it closes) and makes the update from theta_i to theta_{i+1} on every rank alike: the sum over the tokens of what is in it, the
mean that `synchronous` takes. A rank that is late at batch i finds that round summed, makes the same update, and goes on with
batch i + 1: replicas at the same step are equal, and a late gradient was computed at the right parameters, only added later, at
most `staleness` rounds. At a meeting everything is in, and nothing is in flight at a checkpoint, an evaluation, an end.

Eager-SGD's majority collective (Li 2020, "Taming unbalanced training workloads in deep learning with partial collective
operations", section 4) with the bounded staleness of SSP (Ho 2013, section 3). A thread of rank 0 hears of contributions
and tells all threads who is in; then all of them sum, those who have nothing in with zeros.
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

GIVEN, CLOSED = range(2)  # tags: a contribution, to rank 0; who is in, from it. Both float64: target tokens, meeting?; and counts
FIRST_SECONDS, LONGEST_SECONDS = 5e-5, 5e-4  # between two looks, where nothing happens


@dataclass(frozen=True)
class Round:
    """What was summed."""

    slot: int  # the gradient buffer in which the sum is
    tokens: float  # target tokens of all that is in it
    joined: list[int]  # contributions of each rank


class Quorum(Synchronous):
    """Slots of the gradient buffer: 0 for what is applied; the others go from hand to hand. One is computed into, and `staleness`
    at most wait to be summed, are summed, or wait to be applied: a rank that is that many rounds behind has nothing waiting."""

    survives_failures = False
    synchronizes_always = False

    def __init__(self, *parts: Any, **more: Any) -> None:
        """As Synchronous, but the reducer is a FlatReducer. UsageError where threads may not call MPI. Collective over comm."""
        super().__init__(*parts, **more)
        self._alone = self.compute_comm.size == 1  # then there is nobody to be late for, and no thread
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE and not self._alone:
            raise UsageError.on_every_rank(
                "strategy.quorum needs a thread that sums while its rank is late, and this MPI lets no two threads call it "
                "(MPI_THREAD_MULTIPLE): use another build of MPI, or leave strategy.quorum=1"
            )
        assert isinstance(self.reducer, FlatReducer)
        self._flat_reducer, self._comm = self.reducer, self.reducer.comm
        self._flat_reducer.wait_by(OVERLAP_WAITS["poll"])  # it is in a thread, and the core is wanted
        self._lanes = [len(lanes) for lanes in self._flat_reducer.shares.ranges]
        self._needed = max(1, math.ceil(self.options.quorum * sum(self._lanes) - 1e-9))  # 0.1 x 30 is a little more than 3
        self._free = deque(range(1, self.options.staleness + 2))
        self._slot = 0  # into which this rank computes; 0: none yet
        self._steps = 0
        self._joined: list[list[int]] = []  # contributions of each rank, by round since the last meeting
        self._background = Background()
        self._serving = self._closing = False  # from the first batch after a meeting; is the thread to end?
        self._tracker: RoundTracker  # since then
        self._given: SimpleQueue[tuple[int, float, bool]] = SimpleQueue()  # for the thread: slot, target tokens, meeting?
        self._summed: SimpleQueue[Round | BaseException] = SimpleQueue()  # by the thread
        # The thread's own:
        self._mine: deque[int] = deque()  # slots of which rank 0 was told, and which are in no round yet
        self._sends: list[tuple[MPI.Request, np.ndarray]] = []
        self._told, self._heard = 0, [0] * len(self._lanes)  # contributions of which rank 0 was told; of which it has heard

    def more_slots(self, options: StrategyOptions) -> int:
        """Independent."""
        return options.staleness + 1

    def start(self) -> None:
        """UsageError when a run that is to be repeated met at other steps. Collective over compute_comm."""
        super().start()
        order, last = self.options.arrivals, self.options.total_steps
        missing = [step for step in range(1, last + 1) if order and self.synchronizes_at(step) and step not in order]
        if missing:
            raise UsageError.on_every_rank(
                f"strategy.replay: that run did not meet at step {missing[0]}: give this one its meet_every and steps"
            )

    @contextmanager
    def micro_batch(self, v: int, last: bool, chunk: int = 0) -> Iterator[None]:
        """Independent."""
        self._begin()
        self.buffer.point(self._slot)
        yield

    def _begin(self) -> None:
        """A batch needs a buffer; after a meeting, the thread is at work again."""
        if not self._serving:
            meeting = min((step for step in self.options.arrivals if step > self._steps), default=0)
            order = self.options.arrivals[meeting][len(self._joined) :] if meeting else None
            self._tracker = RoundTracker(self._lanes, self._needed, self.options.staleness, order)
            self._serving = True
            if not self._alone:
                self._background.submit(partial(self._serve, self._tracker))
        if not self._slot:
            self._slot = self._free.popleft()
            self.buffer.flat[self._slot].zero_()

    def discard(self) -> None:
        """Independent."""
        if self._slot:
            self.buffer.flat[self._slot].zero_()

    def step(self, lr: float, tokens: int, limit: float = math.inf) -> StepStats:
        """Contribute this rank's part of the batch, and make the update of the batch's round, whoever is in it. tokens: of this
        rank's part. Independent, but that a round needs its quorum; at a meeting collective over compute_comm."""
        self.reducer.observers.enter("reduce")
        self._begin()  # it computed nothing
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
            norm = float(global_norm(gradient)) * scale
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
        """Since the last meeting: who joined each round, and how many lanes were late. The same on every rank."""
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
        """From a meeting to the next. Collective over compute_comm."""
        pause = FIRST_SECONDS
        try:
            while not self._closing:
                if (met := self._turn(tracker)) is None:
                    time.sleep(pause)
                    pause = min(LONGEST_SECONDS, 1.5 * pause)
                elif met:
                    break
                else:
                    pause = FIRST_SECONDS
            while self._sends and not self._closing:
                self._flat_reducer.wait(self._sends.pop()[0])
        except BaseException as error:  # told by step(): a thread's own traceback would be lost
            self._summed.put(error)

    def _turn(self, tracker: RoundTracker) -> bool | None:
        """Pass on what this rank contributed, hear of what others did, and sum the next round once it is closed: was it a
        meeting's? None: it was not yet closed."""
        if (row := self._closed(tracker)) is None:
            return None
        self._sum(row[0], [int(count) for count in row[2:]])
        return bool(row[1])

    def _closed(self, tracker: RoundTracker) -> np.ndarray | None:
        self._sends = [one for one in self._sends if not one[0].Test()]
        while not self._given.empty():
            slot, tokens, synchronizes = self._given.get()
            self._mine.append(slot)
            self._told += 1
            if self._comm.rank:
                self._send(np.array([tokens, synchronizes], dtype=np.float64), 0, GIVEN)
            else:
                self._hear(tracker, 0, tokens, synchronizes)
        row = np.zeros(2 + self._comm.size)
        if self._comm.rank:
            if not self._comm.Iprobe(0, CLOSED):
                return None
            self._comm.Recv(row, 0, CLOSED)
            return row
        status = MPI.Status()
        while not self._alone and self._comm.Iprobe(MPI.ANY_SOURCE, GIVEN, status):
            self._comm.Recv(row[:2], status.Get_source(), GIVEN)
            self._hear(tracker, status.Get_source(), row[0], bool(row[1]))
        if (closed := tracker.close_round()) is None:
            return None
        joined, tokens, synchronizes = closed
        row[:] = [tokens, synchronizes, *joined]
        for rank in range(1, self._comm.size):
            self._send(row, rank, CLOSED)
        return row

    def _hear(self, tracker: RoundTracker, rank: int, tokens: float, synchronizes: bool) -> None:
        self._heard[rank] += 1
        tracker.add(rank, tokens, synchronizes)

    def _send(self, row: np.ndarray, rank: int, tag: int) -> None:
        self._sends.append((self._comm.Isend(row, rank, tag), row))

    def _sum(self, tokens: float, joined: list[int]) -> None:
        """The next round. Collective over compute_comm."""
        slots = [self._mine.popleft() for _ in range(joined[self._comm.rank])]
        slot = slots.pop(0) if slots else self._free.popleft()
        flat = self.buffer.flat[slot]
        if not joined[self._comm.rank]:
            flat.zero_()
        for other in slots:
            flat += self.buffer.flat[other]
            self._free.append(other)
        for bucket in self.buffer.buckets:
            self._flat_reducer.turn_of(flat, bucket)
        self._flat_reducer.end_round(applied=True)  # what is not finite was left out of residuals already
        self._summed.put(Round(slot, tokens, joined))

    # What stays

    def state_dict(self) -> dict[str, Entry]:
        """At a meeting, where nothing is in flight. Independent."""
        found = super().state_dict() | {"steps": Entry(torch.tensor([self._steps]))}
        return found | ({"joined": Entry(torch.tensor(self._joined))} if self._joined else {})  # batches skipped at a meeting

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """UsageError for that of a run without a quorum. Independent."""
        own = {name: state[name] for name in ("steps", "joined") if name in state}
        if "steps" not in own:
            raise UsageError("strategy.quorum is below 1, and the checkpoint is of a run in which it was not")
        super().load_state_dict({name: value for name, value in state.items() if name not in own})
        joined = own.get("joined", torch.zeros(0, 0)).tolist()
        self._steps, self._joined = int(own["steps"]), [row for row in joined if len(row) == len(self._lanes)]

    def release(self) -> None:
        """Independent."""
        super().release()
        self._closing = True

    def close(self) -> None:
        """Also in the middle of a round, where all ranks end at the same batch: what rank 0 was told and did not hear is heard
        now. Collective over compute_comm."""
        self._closing = True
        self._background.close()
        told = self.compute_comm.allgather(self._told)
        for rank in range(1, len(told)) if self._comm.rank == 0 else ():
            for _ in range(told[rank] - self._heard[rank]):
                self._comm.Recv(np.zeros(2), rank, GIVEN)
        for request, _ in self._sends:
            request.Wait()
        super().close()

"""Checkpoints that training does not wait for: who writes what, when, and what all ranks do alike when it cannot be written.

`begin` notes what is to be saved; a thread (saving.py) copies it while the next step is computed, for until the next update
nothing changes; `copied` is the fence before that. Then the thread writes the copy while training goes on: one file a node, each
an equal part. When the next save is due and that one is not done, what each rank says of its thread on the board of the step
decides alike on all: a save that fails is dropped for the new one; where the disk is slow, the new one is left out.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.writer import FAILS, WAITS, WRITES, HostMemory, Save, describe_error
from mpidp.errors import MpidpError
from mpidp.runtime.world import raise_together

YOUNG_SECONDS = 2.0  # a save that began less than so long ago is waited for when the next is due: so short are the steps
FIRST_SECONDS = 60.0  # train.save_every=-1: the first save, whose cost is measured
NODE_SECONDS = 30 * 86400.0  # and a node is taken to fail once in so long, until the run itself has seen more


def best_interval(cost: float, seconds: float, num_nodes: int, failures: int, trained: float) -> float:
    """Seconds between saves that lose least, sqrt(2 x cost x mean time between failures) (Young 1974; Daly 2006). cost: core
    seconds that a save takes from training; seconds: until it is on the disk, twice which is the least. Failures that were
    seen in `trained` seconds count beside one in 30 days of a node. Pure."""
    return max(2 * seconds, math.sqrt(2 * cost * (NODE_SECONDS / num_nodes + trained) / (1 + failures)))


class Saver:
    """Of one job: every rank has one. Independent, the same calls on all ranks, but for what says otherwise."""

    def __init__(
        self, comm: MPI.Intracomm, run_dir: Path, every: int, keep: int, share: tuple[int, int] | None, alone: bool = False,
        may_commit: Callable[[], bool] = lambda: True,
    ) -> None:
        """every: train.save_every; -1: rank 0's clock decides. share: (index, of how many) this rank is of those that write what
        all hold, the first of each node; alone: it holds something that others do not; may_commit: asked on rank 0
        whether run.dir is still this job's. Collective over comm."""
        self.comm, self.run_dir, self.every, self.keep, self.share = comm, run_dir, every, keep, share
        rows = comm.allgather((share is not None or alone, secrets.token_hex(4)))
        self._writers, self._token = [rank for rank, (writes, _) in enumerate(rows) if writes], rows[0][1]
        self._may_commit = may_commit
        self.step = self._before = -1  # of the newest save that was begun and not dropped, and of the one before
        self._number = 0  # of saves that were begun
        self._save: Save | None = None  # the newest, on writers
        self._memory = HostMemory()
        self._stalled = 0.0  # seconds for which the main thread stood still for it
        self._said_slow = False
        self.failures, self.trained = 0, 0.0  # of this run so far, as its record tells; seconds
        self._next, self._interval = time.monotonic() + FIRST_SECONDS, 0.0
        self._news: list[dict[str, Any]] = []

    def resumed_at(self, step: int) -> None:
        """The newest checkpoint is of this step; -1: there is none. Independent."""
        self.step = step

    def seen_before(self, failures: int, trained: float) -> None:
        """What the run's record reports_loss: failures in so many seconds of training. Independent."""
        self.failures, self.trained = failures, trained

    def flags(self) -> np.ndarray:
        """(4,) for the board of the step: does this rank's thread look for records, write, fail? Is a save due by the clock?"""
        state = self._save.state if self._save else None
        late = self.every < 0 and self.comm.rank == 0 and time.monotonic() >= self._next
        return np.array([*(state == one for one in (WAITS, WRITES, FAILS)), late], dtype=float)

    def wait_for_recent_save(self, step: int) -> None:
        """Before the board of this step: if a save is due after it, wait for one that is young."""
        if self.every < 1 or step % self.every:
            return
        while (save := self._save) and save.state in (WAITS, WRITES) and time.monotonic() - save.began < YOUNG_SECONDS:
            time.sleep(0.002)

    def due(self, step: int, flags: np.ndarray) -> bool:
        """Is a save to begin after this step? flags: summed over the ranks. The same on every rank."""
        waits, writes, fails, late = flags.tolist()
        if not (late if self.every < 0 else self.every and step % self.every == 0) or step == self.step:
            return False
        if fails and not writes:
            self._drop()
        elif waits or writes:
            self._news.append({"event": "save_skipped", "step": step, "writing": self.step})
            if self.comm.rank == 0 and not self._said_slow:
                words = "the disk is slower than train.save_every (said once)"
                print(f"step {step}  not saved: step {self.step} is still being written, {words}", flush=True)
            self._said_slow, self._next = True, time.monotonic() + self._interval / 10
            return False
        return True

    def begin(self, step: int, entries: Mapping[str, Entry], meta: Mapping[str, Any], wait: bool = False) -> None:
        """Save this, which must not change before copied() returns; wait: before finish() does. Nothing else is being saved."""
        began, rank = time.monotonic(), self.comm.rank
        self._note()
        self._next = began + (self._interval or FIRST_SECONDS)
        self._before, self.step, self._number, self._stalled = self.step, step, self._number + 1, 0.0
        if rank in self._writers:
            self._save = Save(
                step, self.run_dir / "checkpoints" / f".writing_step_{step:08d}_{self._token}{self._number}",
                entries, self.share, meta, rank, self._writers, self.keep, wait, self._memory, self._may_commit,
            )
        self._stalled = time.monotonic() - began

    def wait_for_copy(self) -> None:
        """The fence: what is being saved may change once every rank has come by here, and then met the others."""
        if self._save and not self._save.released.is_set():
            began = time.monotonic()
            self._save.released.wait()
            self._stalled += time.monotonic() - began

    def wait_for_save(self, must: bool = False, enter: Callable[[str], None] = lambda phase: None) -> None:
        """Wait for what is being saved. When that fails it is dropped, not tried again; when it must not fail, that is an
        MpidpError on every rank. enter: told of the phase whenever a rank has come further. Collective over comm."""
        before, pause = -1, 1e-3
        while True:
            mine = self.flags()[:3]
            row = np.append(mine, self._save.progress if self._save else 0)
            self.comm.Allreduce(MPI.IN_PLACE, row)
            waits, writes, fails, progress = row.tolist()
            if not waits + writes + fails or (fails and not writes):
                break
            if progress != before:
                enter("checkpoint" if mine.any() else "checkpoint_wait")
            before = progress
            time.sleep(pause)
            pause = min(0.1, 1.5 * pause)
        if not fails:
            return
        error = self._drop()
        with raise_together(self.comm):
            if must and error is not None:
                raise MpidpError(
                    f"a checkpoint could not be written in {self.run_dir} ({describe_error(error)}). Make room there, or choose "
                    "another --run.dir; the checkpoints before it are as they were, and the same command goes on from them"
                ) from error

    def pop_events(self) -> list[dict[str, Any]]:
        """Events since it was last asked; on rank 0."""
        self._note()
        told, self._news = self._news, []
        return told if self.comm.rank == 0 else []

    def _note(self) -> None:
        """On rank 0, that the newest save is done, if it is."""
        if self._save and self._save.saved:
            cost, self._save.saved = self._save.saved | {"stall_seconds": self._stalled}, None
            self._news.append({"event": "saved", "step": self._save.step, **cost})
            if self.every < 0:
                self._pace(cost["cpu_seconds"] + self._stalled, cost["seconds"], self._save.began)

    def _pace(self, cost: float, seconds: float, began: float) -> None:
        """Of this save rank 0 knows what it cost: when is the next one due?"""
        num_nodes = self.share[1] if self.share else 1
        before, self._interval = self._interval, best_interval(cost, seconds, num_nodes, self.failures, self.trained)
        self._next = began + self._interval
        if not before / 2 < self._interval < 2 * before:
            print(f"train.save_every=-1: a checkpoint every {self._interval:,.0f} s: it costs {cost:.2g} s of a core and takes "
                  f"{seconds:.2g} s; failures so far: {self.failures}", flush=True)

    def close(self) -> None:
        """Drop what is being saved, on this rank alone; afterwards the thread does not read the state."""
        if self._save:
            self._save.dropping.set()
            self._save.released.wait()

    def _drop(self) -> Exception | None:
        """On all ranks alike, when no thread writes. Returns what went wrong here."""
        error = None
        if self._save:
            self._save.dropping.set()
            self._save.thread.join()
            error = self._save.error
        why = describe_error(error) if error else "see the warning of another rank"
        self._news.append({"event": "save_failed", "step": self.step, "why": why})
        self.step = self._before
        return error

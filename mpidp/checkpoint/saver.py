"""Asynchronous checkpoints. This module decides when a save begins and which ranks write. It ensures that all ranks handle a
failed save in the same way.

begin() starts a save. A thread (writer.py) copies the state while the next step is computed. Before the next update,
wait_for_copy() waits for the copy, because the update changes the state. The thread then writes the copy during training. One
rank per node writes, and the files have about equal sizes.

A save can be due before the previous save has finished. Then all ranks make the same decision, because the step report
(training/step_report.py) gives them the sum of all ranks' flags. If the previous save has failed, it is dropped and the new
save begins. If it is still being written, the new save is skipped.
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
from mpidp.checkpoint.writer import FAILS, WAITS, WRITES, HostMemory, PeerFilesError, Save, describe_error
from mpidp.errors import MpidpError
from mpidp.runtime.log import log
from mpidp.runtime.world import raise_together

YOUNG_SECONDS = 2.0  # a save that is due waits for the previous save, until this time after the previous save's start
FIRST_SECONDS = 60.0  # time until the first save with train.save_every=-1; the cost of this save is measured
NODE_SECONDS = 30 * 86400.0  # assumed mean time between failures of a node


def best_interval(cost: float, seconds: float, num_nodes: int, failures: int, trained: float) -> float:
    """Return the interval between saves that minimizes lost time, in seconds. It is sqrt(2 x cost x mean time between failures)
    (Young 1974; Daly 2006), but at least twice the duration of a save.

    `cost`: the core seconds that a save takes from training. `seconds`: the duration of a save. `failures`, `trained`: the
    number of failures and the seconds of training so far. The mean time between failures is estimated from `failures`,
    `trained`, and an assumed rate of one failure per node in 30 days. Pure.
    """
    return max(2 * seconds, math.sqrt(2 * cost * (NODE_SECONDS / num_nodes + trained) / (1 + failures)))


class Saver:
    """Saves the checkpoints of a job. Each rank has one `Saver` object, and all ranks must make the same calls. A method waits
    for other ranks only if its docstring says Collective."""

    def __init__(
        self, comm: MPI.Intracomm, run_dir: Path, every: int, keep: int, share: tuple[int, int] | None, alone: bool = False,
        may_commit: Callable[[], bool] = lambda: True,
    ) -> None:
        """`every`: train.save_every; -1 means that rank 0's clock decides when a save is due. `keep`: the number of checkpoints
        to keep. `share`: (index of this rank, number of ranks) among the first ranks of the nodes, which write the replicated
        tensors. Other ranks pass None. `alone`: whether this rank holds tensors that no other rank has. `may_commit`: a function
        that rank 0 calls. It returns whether this job still holds the lock of the run. Collective over comm."""
        self.comm, self.run_dir, self.every, self.keep, self.share = comm, run_dir, every, keep, share
        rows = comm.allgather((share is not None or alone, secrets.token_hex(4)))
        self._writers, self._token = [rank for rank, (writes, _) in enumerate(rows) if writes], rows[0][1]
        self._may_commit = may_commit
        self.step = self._before = -1  # steps of the newest save that was not dropped, and of the save before it
        self._number = 0  # number of saves that were started
        self._save: Save | None = None  # the newest save, on ranks that write
        self._memory = HostMemory()
        self._stalled = 0.0  # seconds that the main thread has waited for the newest save
        self._warned = False
        self.failures, self.trained = 0, 0.0  # number of failures, and seconds of training, from metrics.jsonl
        self._next, self._interval = time.monotonic() + FIRST_SECONDS, 0.0
        self._events: list[dict[str, Any]] = []

    def resumed_at(self, step: int) -> None:
        """Record the step of the newest checkpoint. `step`: this step, or -1 if there is no checkpoint. Independent."""
        self.step = step

    def seen_before(self, failures: int, trained: float) -> None:
        """Record the number of failures and the seconds of training so far, which are read from metrics.jsonl. Independent."""
        self.failures, self.trained = failures, trained

    def flags(self) -> np.ndarray:
        """Return this rank's flags for the step report, of shape (4,). Each flag is 0 or 1. Flag 0: the thread of the save
        waits for files of other ranks. Flag 1: the thread writes. Flag 2: the thread's last attempt to write has failed. Flag
        3: a save is due by the clock."""
        state = self._save.state if self._save else None
        late = self.every < 0 and self.comm.rank == 0 and time.monotonic() >= self._next
        return np.array([*(state == one for one in (WAITS, WRITES, FAILS)), late], dtype=float)

    def wait_for_recent_save(self, step: int) -> None:
        """If a save is due after this step, wait until the previous save has finished, but not longer than YOUNG_SECONDS after
        the start of the previous save. Call this method before the ranks exchange the step report."""
        if self.every < 1 or step % self.every:
            return
        while (save := self._save) and save.state in (WAITS, WRITES) and time.monotonic() - save.began < YOUNG_SECONDS:
            time.sleep(0.002)

    def due(self, step: int, flags: np.ndarray) -> bool:
        """Return whether to begin a save after this step. If a save is due but the previous save has failed, drop the failed
        save. `flags`: the sum of flags() over the ranks. The result is the same on all ranks."""
        waits, writes, fails, late = flags.tolist()
        if not (late if self.every < 0 else self.every and step % self.every == 0) or step == self.step:
            return False
        if fails and not writes:
            self._drop()
        elif waits or writes:
            self._events.append({"event": "save_skipped", "step": step, "writing": self.step})
            if self.comm.rank == 0 and not self._warned:
                log.info("step %d  no checkpoint, because that of step %d is still being written. The disk is too slow for "
                         "train.save_every: raise this setting, or use a faster disk (logged once)", step, self.step)
            self._warned, self._next = True, time.monotonic() + self._interval / 10
            return False
        return True

    def begin(self, step: int, entries: Mapping[str, Entry], meta: Mapping[str, Any], wait: bool = False) -> None:
        """Begin a save of `entries`. No other save may be running. `meta`: further content of the manifest.

        The entries must not change before wait_for_copy() returns. With wait=True, they must not change before wait_for_save()
        returns.
        """
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
        """Wait until this rank's state has been copied. The caller may change the state when this call has returned on all
        ranks and the ranks have synchronized."""
        if self._save and not self._save.released.is_set():
            began = time.monotonic()
            self._save.released.wait()
            self._stalled += time.monotonic() - began

    def wait_for_save(self, must: bool = False, enter: Callable[[str], None] = lambda phase: None) -> None:
        """Wait until the current save has finished. If the save fails, drop it, and raise MpidpError on all ranks if `must` is
        true. `enter`: a function that is called with the name of the phase whenever a rank has made progress. Collective over
        comm."""
        before, pause = -1, 1e-3
        while True:
            own_flags = self.flags()[:3]
            row = np.append(own_flags, self._save.progress if self._save else 0)
            self.comm.Allreduce(MPI.IN_PLACE, row)
            waits, writes, fails, progress = row.tolist()
            if not waits + writes + fails or (fails and not writes):
                break
            if progress != before:
                enter("checkpoint" if own_flags.any() else "checkpoint_wait")
            before = progress
            time.sleep(pause)
            pause = min(0.1, 1.5 * pause)
        if not fails:
            return
        error = self._drop()
        is_cause = error is not None and not isinstance(error, PeerFilesError)
        has_cause = self.comm.allreduce(is_cause, MPI.LOR)  # a rank that misses other ranks' files does not know the cause
        with raise_together(self.comm):
            if must and error is not None and (is_cause or not has_cause):
                raise MpidpError(
                    f"a checkpoint could not be written in {self.run_dir} ({describe_error(error)}). Free some space, or use "
                    "another --run.dir. Earlier checkpoints are intact, and the same command resumes from them"
                ) from error

    def pop_events(self) -> list[dict[str, Any]]:
        """On rank 0, return the saving events since the last call of pop_events(). On other ranks, return an empty list."""
        self._note()
        events, self._events = self._events, []
        return events if self.comm.rank == 0 else []

    def _note(self) -> None:
        """Record an event if the newest save has been committed since the last call of this method. Ranks other than 0 record
        no events."""
        if self._save and self._save.saved:
            cost, self._save.saved = self._save.saved | {"stall_seconds": self._stalled}, None
            self._events.append({"event": "saved", "step": self._save.step, **cost})
            if self.every < 0:
                self._pace(cost["cpu_seconds"] + self._stalled, cost["seconds"], self._save.began)

    def _pace(self, cost: float, seconds: float, began: float) -> None:
        """Compute when the next save is due. `cost`, `seconds`: see best_interval(). `began`: the time at which the last save
        began."""
        num_nodes = self.share[1] if self.share else 1
        before, self._interval = self._interval, best_interval(cost, seconds, num_nodes, self.failures, self.trained)
        self._next = began + self._interval
        if not before / 2 < self._interval < 2 * before:
            log.info(f"train.save_every=-1: one checkpoint every {self._interval:,.0f} s. Each costs {cost:.2g} core seconds "
                     f"and takes {seconds:.2g} s; {self.failures} failures so far")

    def close(self) -> None:
        """Drop the current save on this rank. Return when its thread no longer reads the state."""
        if self._save:
            self._save.dropping.set()
            self._save.released.wait()

    def _drop(self) -> Exception | None:
        """Drop the failed save, and return this rank's error or None. All ranks must call this method, at a time when no thread
        is writing."""
        error = None
        if self._save:
            self._save.dropping.set()
            self._save.thread.join()
            error = self._save.error
        why = describe_error(error) if error else "see the warning of another rank"
        self._events.append({"event": "save_failed", "step": self.step, "why": why})
        self.step = self._before
        return error

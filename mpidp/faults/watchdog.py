"""The watchdog ends a hung job: it names the ranks that block the other ranks, prints stacks, and aborts."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from mpidp.errors import HANG_EXIT_CODE
from mpidp.faults.heartbeat import LOST, HeartbeatBoard, blame
from mpidp.runtime.log import log
from mpidp.runtime.observers import StepObserver

STEPS = 20  # a job without progress counts as hung, at the earliest after the time of this many usual steps
REMEMBERED = 50  # the time of a usual step is the median over this many recent steps
STACKS = 8  # maximum number of ranks per node that print their stacks


class Watchdog(StepObserver):
    """Records this rank's step and phase on the heartbeat board. The job counts as hung if no rank has a heartbeat for
    `hang_seconds` or for the time of 20 usual steps, whichever is longer. One rank of each node then prints a report, and all
    processes exit with code 6.

    A Python thread checks the heartbeats, also during blocking MPI calls. If the GIL is never released, faulthandler's timer ends
    the process. The first occurrence of a phase may take `first_times` times as long, for example to compile code, to open
    connections or to read files. Checks begin with the first phase. Independent.
    """

    def __init__(
        self, board: HeartbeatBoard | None, hang_seconds: float, first_times: float = 3.0, abort: Callable[[int], Any] = os._exit,
        on_hang: Callable[[str], None] = lambda message: None, waits: Callable[[], bool] = lambda: False,
    ) -> None:
        """`board`: the heartbeat board, or None to disable the watchdog. `abort`: a function that ends the whole job with a given
        exit code. `on_hang`: a function that is called with the report's message if the job hangs. `waits`: a function that
        returns whether this rank waits for other ranks."""
        self.board, self.hang_seconds, self.first_times = board, hang_seconds, first_times
        self._abort, self._on_hang, self._waits = abort, on_hang, waits
        self._at, self._bucket = (0, ""), -1
        self._entered = self._heard = math.inf
        self._step_began = 0.0
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)  # durations of the last steps, in seconds
        self._done: set[str] = {""}  # phases that were completed at least once
        self._stop = threading.Event()
        if board is not None:
            faulthandler.register(signal.SIGUSR2)  # `kill -USR2 PID` prints a rank's stacks at any time
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, step: int, phase: str) -> None:
        """Record that this rank begins a phase of a step."""
        now = time.monotonic()
        if (step, phase) != self._at:
            self._done.add(self._at[1])
            if phase == "data":
                if self._step_began:
                    self._seconds.append(now - self._step_began)
                self._step_began, self._bucket = now, -1
            self._at, self._entered = (step, phase), now
        self.beat()

    def beat(self) -> None:
        """Record a heartbeat in the current phase."""
        self._heard = time.monotonic()
        self._write()

    def _write(self) -> None:
        if self.board is not None and self._at[1]:
            self.board.write(*self._at, self._bucket, self._entered, self._heard, self._waits())

    def progressed(self) -> None:
        """Record a heartbeat, as beat() does."""
        self.beat()

    def reducing(self, bucket: int) -> None:
        """Record that this rank begins to reduce a bucket."""
        self._bucket = bucket
        self.beat()

    def timeouts(self) -> tuple[float, float]:
        """Return (usual, current), the seconds without progress after which the job counts as hung. `usual`: for phases that have
        occurred before. `current`: for the current phase of this rank."""
        usual = max(self.hang_seconds, STEPS * statistics.median_low(self._seconds or [0.0]))
        return usual, usual * (1.0 if self._at[1] in self._done else self.first_times)

    def close(self) -> None:
        """Stop watching, and close the board."""
        self._stop.set()
        if self.board is not None:
            self.enter(self._at[0] + 1, "end")
            self.board.close()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        assert self.board is not None
        tick = min(1.0, self.hang_seconds / 8)
        before = time.monotonic()
        while not self._stop.wait(tick):
            now = time.monotonic()
            if now - before > tick + 2:
                self._heard += now - before  # this process was stopped for a while, perhaps together with all other ranks
            before = now
            self._write()  # since the last heartbeat, the rank may have begun to wait for other ranks
            usual, deadline = self.timeouts()
            faulthandler.dump_traceback_later(1.5 * deadline + 5, exit=True)  # ends the process if this thread cannot run again
            if now - self._entered > usual / 4:
                self.board.exchange(usual / 20)
            if now - self._heard > deadline and (quiet := self.board.quiet_seconds()) > deadline:
                if self.board.claim_report():
                    self._report(self.board, quiet, usual)
                    time.sleep(tick + 0.5)  # let other nodes reach their deadlines and report
                    threading.Timer(3.0, os._exit, (HANG_EXIT_CODE,)).start()  # in case MPI itself hangs
                    self._abort(HANG_EXIT_CODE)
                os._exit(HANG_EXIT_CODE)
        faulthandler.cancel_dump_traceback_later()

    def _report(self, board: HeartbeatBoard, quiet: float, usual: float) -> None:
        message, blamed = blame(board.rows(silent_seconds=usual / 5))
        steps = f", {STEPS} steps take {usual:.0f} s" if usual > self.hang_seconds else ""
        log.error(
            f"mpidp: no rank has made progress for {quiet:.0f} s (run.hang_seconds is {self.hang_seconds:g}{steps}): {message}. "
            f"Stacks follow, first those of rank {board.rank}; then the job ends with exit code {HANG_EXIT_CODE}"
        )
        faulthandler.dump_traceback()
        here = [row for row in blamed if row.host == board.host and row.rank != board.rank and row.state not in LOST]
        for row in here[:STACKS]:
            log.error("stacks of rank %d (pid %d):", row.rank, row.pid)
            time.sleep(0.3)  # let mpirun forward this line
            os.kill(row.pid, signal.SIGUSR2)  # the rank prints its own stacks
        self._on_hang(message)

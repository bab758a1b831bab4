"""When no rank gets any further, one says for whom everybody waits, with stacks, and ends the job: nothing hangs."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from mpidp.errors import HANG_EXIT_CODE
from mpidp.faults.heartbeat import LOST, HeartbeatBoard, blame
from mpidp.runtime.observers import StepObserver

STEPS = 20  # a hang is longer than so many usual steps
REMEMBERED = 50  # steps of which the usual one is the median
STACKS = 8  # ranks of a node that print theirs


class Watchdog(StepObserver):
    """Writes on the board where this rank is. When no rank has given a sign of life for max(hang_seconds, 20 usual steps), the
    process exits with code 6, and one rank of each node says who is to blame.

    A thread does it, since blocking MPI calls release the GIL; faulthandler's own timer stands behind it for a GIL that is
    held for ever. What a rank does for the first time (compiling, connecting, reading cold files) may take `first_times` as
    long. The watch begins with the first phase. Independent.
    """

    def __init__(
        self, board: HeartbeatBoard | None, hang_seconds: float, first_times: float = 3.0, abort: Callable[[int], Any] = os._exit,
        on_hang: Callable[[str], None] = lambda report: None,
    ) -> None:
        """No board: no watch. abort: ends the whole job with this exit code. on_hang: is called with the report of a hang."""
        self.board, self.hang_seconds, self.first_times = board, hang_seconds, first_times
        self._abort, self._on_hang = abort, on_hang
        self._at, self._bucket = (0, ""), -1
        self._entered = self._heard = math.inf
        self._step_began = 0.0
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)  # of the last steps
        self._done: set[str] = {""}  # phases that were left once
        self._stop = threading.Event()
        if board is not None:
            faulthandler.register(signal.SIGUSR2)  # `kill -USR2 PID` prints a rank's stacks, whatever it does
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, step: int, phase: str) -> None:
        """Alive, and about to do this in that step."""
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
        """Alive, in the same phase."""
        self._heard = time.monotonic()
        if self.board is not None and self._at[1]:
            self.board.write(*self._at, self._bucket, self._entered, self._heard)

    def progressed(self) -> None:
        """Alive, in the same phase."""
        self.beat()

    def reducing(self, bucket: int) -> None:
        """Alive, and about to reduce this bucket."""
        self._bucket = bucket
        self.beat()

    def timeouts(self) -> tuple[float, float]:
        """How long nothing may happen: usually, and in this phase."""
        usual = max(self.hang_seconds, STEPS * statistics.median_low(self._seconds or [0.0]))
        return usual, usual * (1.0 if self._at[1] in self._done else self.first_times)

    def close(self) -> None:
        """No more watch."""
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
                self._heard += now - before  # this process was stopped for a while, and perhaps all others with it
            before = now
            usual, deadline = self.timeouts()
            faulthandler.dump_traceback_later(1.5 * deadline + 5, exit=True)  # should this thread never run again
            if now - self._entered > usual / 4:
                self.board.exchange(usual / 20)
            if now - self._heard > deadline and (quiet := self.board.quiet_seconds()) > deadline:
                if self.board.claim_report():
                    self._report(self.board, quiet, usual)
                    time.sleep(tick + 0.5)  # other nodes reach their deadlines now
                    threading.Timer(3.0, os._exit, (HANG_EXIT_CODE,)).start()  # MPI may be what hangs
                    self._abort(HANG_EXIT_CODE)
                os._exit(HANG_EXIT_CODE)
        faulthandler.cancel_dump_traceback_later()

    def _report(self, board: HeartbeatBoard, quiet: float, usual: float) -> None:
        words, blamed = blame(board.rows(silent_seconds=usual / 5))
        steps = f", {STEPS} steps take {usual:.0f} s" if usual > self.hang_seconds else ""
        print(
            f"mpidp: no rank has got further for {quiet:.0f} s (run.hang_seconds is {self.hang_seconds:g}{steps}): {words}. "
            f"Stacks follow, first those of rank {board.rank}, then the job ends with exit code {HANG_EXIT_CODE}",
            file=sys.stderr, flush=True,
        )
        faulthandler.dump_traceback()
        here = [row for row in blamed if row.host == board.host and row.rank != board.rank and row.state not in LOST]
        for row in here[:STACKS]:
            print(f"stacks of rank {row.rank} (pid {row.pid}):", file=sys.stderr, flush=True)
            time.sleep(0.3)  # for mpirun to pass this on
            os.kill(row.pid, signal.SIGUSR2)  # it prints them itself
        self._on_hang(words)

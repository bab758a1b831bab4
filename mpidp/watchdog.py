"""A rank that waits too long says where, and ends the job: nothing hangs."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

from mpidp.errors import HANG_EXIT_CODE


class Watchdog:
    """Unless beat() is called every deadline_seconds, all stacks are printed and the process exits with code 6.

    A thread does it, since blocking MPI calls release the GIL; faulthandler's own timer stands behind it for a GIL that is
    held for ever. Independent.
    """

    def __init__(self, rank: int, deadline_seconds: float) -> None:
        """deadline_seconds 0: no watch."""
        self.rank, self.deadline_seconds = rank, deadline_seconds
        self.doing = "start"
        self._beat_at = time.monotonic()
        self._stop = threading.Event()
        if deadline_seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        self.beat("start")

    def beat(self, doing: str) -> None:
        """Alive, and about to do this."""
        self.doing, self._beat_at = doing, time.monotonic()
        if self.deadline_seconds > 0 and not self._stop.is_set():
            faulthandler.dump_traceback_later(1.5 * self.deadline_seconds + 5, exit=True)

    def close(self) -> None:
        """No more watch."""
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.deadline_seconds / 4)):
            waited = time.monotonic() - self._beat_at
            if waited > self.deadline_seconds:
                print(
                    f"mpidp: rank {self.rank} has waited {waited:.0f} s in {self.doing!r} (run.hang_seconds is "
                    f"{self.deadline_seconds:g}); its stacks follow, then the job ends with exit code {HANG_EXIT_CODE}",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                time.sleep(0.3)  # ranks reach their deadlines together: let each finish its stacks before one ends the job
                os._exit(HANG_EXIT_CODE)

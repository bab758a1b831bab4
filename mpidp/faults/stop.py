"""Stop requests. A signal, a file or the job's time limit sets a flag on one rank. The ranks exchange their flags in each step,
because signal handlers must not call MPI."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import FrameType

TAKEN_OVER = "another copy of this job has taken over"


class StopRequest:
    """Detects requests to stop: the signals SIGUSR1, SIGTERM and SIGINT, a file STOP in run.dir, the time limit, and the loss of
    the run's lock. Of these signals, SIGUSR1 is the only one that both MPICH's and Open MPI's mpirun forward. Independent."""

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(
        self, stop_file: Path | None, stop_at: float = math.inf, lost: Callable[[], bool] = lambda: False,
        reason: str = "",
    ) -> None:
        """`stop_file`: the path of the file STOP, or None on ranks that do not check for this file. `stop_at`: the time at which
        to stop, in seconds since 1970. `lost`: a function that returns whether another job has taken over the run. `reason`: why
        a stop was requested before, or ""."""
        self.reason = reason
        self._stop_file, self._stop_at, self._lost = stop_file, stop_at, lost
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def requested(self) -> bool:
        """Return whether a stop has been requested on this rank."""
        if self._lost():
            self.reason = TAKEN_OVER
        elif not self.reason and self._stop_file is not None and self._stop_file.exists():
            self.reason = f"file {self._stop_file}"
        elif not self.reason and time.time() >= self._stop_at:
            self.reason = "the job's time limit"
        return bool(self.reason)

    def close(self) -> None:
        """Restore the signal handlers. If a stop was requested, remove the file STOP."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._stop_file is not None and self.reason not in ("", TAKEN_OVER):
            self._stop_file.unlink(missing_ok=True)


def stop_time(end: float | None, now: float, early_seconds: float) -> float:
    """Return the time at which a job should stop, `early_seconds` before `end`. `early_seconds` is limited to a tenth of the
    time from `now` to `end`. `end`: the time at which Slurm ends the job, or None.

    Times are in seconds since 1970. Returns infinity if `end` is None or in the past, or if `early_seconds` is 0. Pure."""
    if end is None or end <= now or not early_seconds:
        return math.inf
    return end - min(early_seconds, (end - now) / 10)


def job_end(environment: Mapping[str, str] = os.environ, timeout_seconds: float = 5.0) -> float | None:
    """Return the time at which Slurm will end this job, in seconds since 1970, or None if it is unknown. The time is read from
    the environment or from squeue. Independent."""
    job = environment.get("SLURM_JOB_ID")
    if not job:
        return None
    with suppress(ValueError):
        return float(environment.get("SLURM_JOB_END_TIME", ""))
    with suppress(OSError, ValueError, IndexError, subprocess.SubprocessError):  # squeue may print N/A
        result = subprocess.run(["squeue", "-h", "-j", job, "-o", "%e"], capture_output=True, text=True, check=True,
                               timeout=timeout_seconds, stdin=subprocess.DEVNULL, env=dict(environment))
        return datetime.fromisoformat(result.stdout.split()[0]).timestamp()
    return None

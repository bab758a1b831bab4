"""Waits for other ranks by polling. Between polls, the core is free for processes that compute.

Three alternatives were not faster in a training step of DDP, in which the main thread computes during communication. Alternative
1 sleeps after every poll. Alternative 2 polls without pauses. Alternative 3 sleeps after every poll only while the process
computes. For small calls, alternative 1 is slower (docs/results/2026-11-27-c10d.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from mpi4py import MPI

YIELDS, FIRST_SECONDS, LONGEST_SECONDS = 1000, 2e-5, 5e-4  # polls without a pause, then the shortest and the longest pause


class Aborted(Exception):
    """Raised by a waiting call when its group is aborted."""


def wait_for(request: MPI.Request, aborted: Callable[[], bool]) -> None:
    """Poll until the request completes. In the first millisecond or so, polls have no pauses between them. Later polls do, and
    the pauses grow.

    Raises Aborted if aborted() returns True before the request completes. Independent.
    """
    polls, pause = 0, FIRST_SECONDS
    while not request.Test():
        polls += 1
        if polls <= YIELDS:
            os.sched_yield()
            continue
        if aborted():
            raise Aborted
        time.sleep(pause)
        pause = min(LONGEST_SECONDS, 1.5 * pause)

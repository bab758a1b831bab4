"""Waits for other ranks by polling. While a wait pauses between two polls, other processes can use the core. (Alternatives were
measured in docs/results/2026-11-27-c10d.md.)"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from mpi4py import MPI

YIELDS, FIRST_SECONDS, LONGEST_SECONDS = 1000, 2e-5, 5e-4  # number of polls without a pause; the shortest and the longest pause


class Aborted(Exception):
    """Raised by wait_for() when the group is aborted."""


def wait_for(request: MPI.Request, aborted: Callable[[], bool]) -> None:
    """Poll until the request completes. For about the first millisecond, there is no pause between polls. Later, the pauses grow.

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

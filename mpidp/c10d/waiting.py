"""Waits for other ranks by polling, and gives up the core between polls for processes that compute.

Three alternatives were no faster in DDP's step, where the main thread computes during communication: to sleep without polling
first, to poll without pauses, or to do the first while the process computes and the second otherwise. To sleep without polling
first is slower for small calls (docs/results/2026-11-27-c10d.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from mpi4py import MPI

YIELDS, FIRST_SECONDS, LONGEST_SECONDS = 1000, 2e-5, 5e-4  # polls without a pause, then the shortest and the longest pause


class Aborted(Exception):
    """The group was aborted while a call waited."""


def wait_for(request: MPI.Request, aborted: Callable[[], bool]) -> None:
    """Poll until the request completes. The first polls, for about 1 ms, have no pauses. Later pauses grow.

    Raises Aborted if aborted() returns True. Independent.
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

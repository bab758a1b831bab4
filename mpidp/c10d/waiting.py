"""Waits for other ranks by polling, and yields the core between polls to processes that compute.

Three alternatives were not faster in a step of DDP, in which the main thread computes during communication: (1) sleep from the
first poll on; (2) poll without pauses; (3) use (1) while the process computes, and (2) otherwise. For small calls, (1) is slower
(docs/results/2026-11-27-c10d.md).
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

"""Wait for other ranks: poll the request, and leave the core to processes that compute.

Three alternatives were no faster in DDP's step, where the main thread computes during communication: to sleep without polling
first, to poll without pauses, and to choose between them by whether the process is computing. To sleep without polling first is
slower for small calls (docs/results/2026-11-27-c10d.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from mpi4py import MPI

YIELDS, FIRST_SECONDS, LONGEST_SECONDS = 1000, 2e-5, 5e-4  # polls without a pause; the first and the longest pause after them


class Aborted(Exception):
    """Raised if the group is aborted while a call waits."""


def wait_for(request: MPI.Request, aborted: Callable[[], bool]) -> None:
    """Poll until the request completes: for about 1 ms without pauses, then with growing pauses.

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

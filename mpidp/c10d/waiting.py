"""Waiting for other ranks: poll the request, and leave the core to processes that compute.

Alternatives were no faster in DDP's step, where the main thread computes during communication: sleeping at once, spinning, or
choosing by whether the process computes. Sleeping at once is slower for small calls (docs/results/2026-11-27-c10d.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from mpi4py import MPI

YIELDS, FIRST_SECONDS, LONGEST_SECONDS = 1000, 2e-5, 5e-4


class Aborted(Exception):
    """The group was aborted while a call waited."""


def wait_for(request: MPI.Request, aborted: Callable[[], bool]) -> None:
    """Poll until the request completes: for about 1 ms without pauses, then with growing ones. Raises Aborted. Independent."""
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

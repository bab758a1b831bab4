"""How a call waits for the others: it looks, and leaves its core to those that compute.

Measured (docs/results/2026-11-27-c10d.md): sleeping at once, spinning on, and choosing by whether the process computes otherwise
were no faster in DDP's step, whose main thread computes meanwhile; sleeping at once is slower for a small call.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from mpi4py import MPI

YIELDS, FIRST_SECONDS, LONGEST_SECONDS = 1000, 2e-5, 5e-4


class GivenUp(Exception):
    """Somebody decided that this exchange will not end."""


def until(request: MPI.Request, given_up: Callable[[], bool]) -> None:
    """Wait by looking: for about a millisecond at once again, then with pauses, so that ranks that compute have the core.
    Independent."""
    looks, pause = 0, FIRST_SECONDS
    while not request.Test():
        looks += 1
        if looks <= YIELDS:
            os.sched_yield()
            continue
        if given_up():
            raise GivenUp
        time.sleep(pause)
        pause = min(LONGEST_SECONDS, 1.5 * pause)

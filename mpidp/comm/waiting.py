"""How a rank waits for MPI requests. MPI's own wait spins, which is best if every rank has its own core. If ranks share cores, a
waiting rank must yield its core to the ranks that compute."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from mpi4py import MPI

Wait = Callable[[MPI.Request], None]


def spin(request: MPI.Request) -> None:
    """Wait with MPI's own (spinning) wait. Independent."""
    request.Wait()


def doze(request: MPI.Request, yields: int = 1000, first_seconds: float = 2e-5, longest_seconds: float = 5e-4) -> None:
    """Poll, and give up the core between polls: first by yielding, for about a millisecond, since most waits are short; then by
    sleeping for longer and longer. Independent."""
    for _ in range(yields):
        if request.Test():
            return
        os.sched_yield()
    pause = first_seconds
    while not request.Test():
        time.sleep(pause)
        pause = min(longest_seconds, 1.5 * pause)


def how_to_wait(num_ranks: int, num_cores: int) -> Wait:
    """Return how num_ranks ranks of a node with num_cores cores should wait. Pure."""
    return doze if num_ranks > num_cores else spin

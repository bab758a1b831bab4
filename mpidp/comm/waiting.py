"""How a rank waits for the others: MPI's own wait spins, which is right where every rank has a core of its own; where ranks
share cores, a rank that waits must leave its core to those that work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from mpi4py import MPI

Wait = Callable[[MPI.Request], None]


def spin(request: MPI.Request) -> None:
    """MPI's own wait. Independent."""
    request.Wait()


def doze(request: MPI.Request, yields: int = 1000, first_seconds: float = 2e-5, longest_seconds: float = 5e-4) -> None:
    """Look, and between looks let others run: by yielding the core at first, a millisecond or so, since what is waited for is
    mostly near; then by sleeping, ever longer. Independent."""
    for _ in range(yields):
        if request.Test():
            return
        os.sched_yield()
    pause = first_seconds
    while not request.Test():
        time.sleep(pause)
        pause = min(longest_seconds, 1.5 * pause)


def how_to_wait(num_ranks: int, num_cores: int) -> Wait:
    """For num_ranks ranks of a node that has num_cores cores for them. Pure."""
    return doze if num_ranks > num_cores else spin

"""Functions that wait for an MPI request. MPI's own wait spins, which means that it checks without pauses. Spinning is best if
every rank has its own core. If ranks share cores, a waiting rank must yield its core to the ranks that compute."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import cast

from mpi4py import MPI

Wait = Callable[[MPI.Request], None]


def spin(request: MPI.Request) -> None:
    """Wait with MPI's own wait, which spins. Independent."""
    request.Wait()


def doze(request: MPI.Request, yields: int = 1000, first_seconds: float = 2e-5, longest_seconds: float = 5e-4) -> None:
    """Check the request repeatedly until it is complete. After each of the first `yields` checks, only yield the core to other
    processes. After each later check, sleep. The sleeps become longer, from `first_seconds` to `longest_seconds`. Independent."""
    for _ in range(yields):
        if request.Test():
            return
        os.sched_yield()
    pause = first_seconds
    while not request.Test():
        time.sleep(pause)
        pause = min(longest_seconds, 1.5 * pause)


def main_thread_waits() -> bool:
    """Return whether the main thread of this process is in spin() or doze(). Any thread may call this function. Independent."""
    frame = sys._current_frames().get(cast(int, threading.main_thread().ident))
    while frame is not None and frame.f_code not in (spin.__code__, doze.__code__):
        frame = frame.f_back
    return frame is not None


def how_to_wait(num_ranks: int, num_cores: int) -> Wait:
    """Return the function with which ranks should wait if `num_ranks` ranks run on a node with `num_cores` cores: spin or doze.
    Pure."""
    return doze if num_ranks > num_cores else spin

"""Functions that wait for an MPI request. MPI's own wait spins, which means that it checks without pauses. Spinning is best if
every rank has its own core. If ranks share cores, a waiting rank must yield its core to the ranks that compute."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpi4py import MPI

Wait = Callable[[MPI.Request], None]


class WaitReports:
    """Reports when the main thread of this process begins to wait for other ranks, and when it stops waiting."""

    def __init__(self) -> None:
        self.observe: Callable[[bool], None] = lambda waits: None  # called with True when a wait begins, with False when it ends

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Return a context manager. Wait for other ranks inside it. In the main thread, it reports the beginning and the end of
        the wait to `observe`. Independent."""
        reports = threading.current_thread() is threading.main_thread()
        if reports:
            self.observe(True)
        try:
            yield
        finally:
            if reports:
                self.observe(False)


REPORTS = WaitReports()


def spin(request: MPI.Request) -> None:
    """Wait with MPI's own wait, which spins. Independent."""
    with REPORTS.waiting():
        request.Wait()


def doze(request: MPI.Request, yields: int = 1000, first_seconds: float = 2e-5, longest_seconds: float = 5e-4) -> None:
    """Check the request repeatedly until it is complete. After each of the first `yields` checks, only yield the core to other
    processes. After each later check, sleep. The sleeps become longer, from `first_seconds` to `longest_seconds`. Independent."""
    with REPORTS.waiting():
        for _ in range(yields):
            if request.Test():
                return
            os.sched_yield()
        pause = first_seconds
        while not request.Test():
            time.sleep(pause)
            pause = min(longest_seconds, 1.5 * pause)


def how_to_wait(num_ranks: int, num_cores: int) -> Wait:
    """Return the function with which ranks should wait if `num_ranks` ranks run on a node with `num_cores` cores: spin or doze.
    Pure."""
    return doze if num_ranks > num_cores else spin

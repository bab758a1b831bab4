"""Prevents MPI from starting in processes that multiprocessing starts, such as the workers of a DataLoader. These processes
are not ranks.

A worker process inherits the launcher's environment variables. If a worker process called MPI_Init, it would pretend to be a
rank that is already running, and crash or hang. `from mpi4py import MPI` calls MPI_Init.
"""

from __future__ import annotations

import multiprocessing
import sys

from mpidp.runtime.environment import launched


def is_worker_process() -> bool:
    """Return whether multiprocessing started this process, with fork, spawn or forkserver. Independent."""
    if multiprocessing.parent_process() is not None:
        return True
    # With spawn or forkserver, a process imports the program before parent_process() is set. In the server
    # process of forkserver, parent_process() is never set.
    inheriting = getattr(multiprocessing.current_process(), "_inheriting", False)
    return inheriting or any(word.startswith("from multiprocessing.") for word in sys.orig_argv)


def keep_mpi_off_in_workers() -> None:
    """If a launcher started the job and this is a worker process, prevent `from mpi4py import MPI` from starting MPI.
    Independent."""
    if launched() and is_worker_process():
        import mpi4py

        mpi4py.rc.initialize = False

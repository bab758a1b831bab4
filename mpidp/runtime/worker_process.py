"""Keeps MPI off in processes that multiprocessing starts, e.g. workers of a DataLoader, because they are not ranks.

Such a process inherits the launcher's environment variables. `from mpi4py import MPI` calls MPI_Init. In such a process, MPI_Init
would use the number of a rank that is already running, and crash or hang.
"""

from __future__ import annotations

import multiprocessing
import sys

from mpidp.runtime.environment import launched


def is_worker_process() -> bool:
    """Return whether multiprocessing started this process, with any start method. Independent."""
    if multiprocessing.parent_process() is not None:
        return True
    # With spawn or forkserver, a process imports the program before parent_process() is set. In forkserver's server it is never
    # set.
    inheriting = getattr(multiprocessing.current_process(), "_inheriting", False)
    return inheriting or any(word.startswith("from multiprocessing.") for word in sys.orig_argv)


def keep_mpi_off_in_workers() -> None:
    """Prevent `from mpi4py import MPI` from starting MPI in a worker process of a job. Without a launcher, such a process may be
    an MPI job of one rank. Independent."""
    if launched() and is_worker_process():
        import mpi4py

        mpi4py.rc.initialize = False

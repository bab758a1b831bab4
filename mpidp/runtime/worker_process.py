"""A process that multiprocessing starts, e.g. a worker of a DataLoader, is not a rank: it must not start MPI.

It inherits the launcher's environment variables. `from mpi4py import MPI` calls MPI_Init. In such a process, MPI_Init would use
the number of a rank that is already running, and crash or hang.
"""

from __future__ import annotations

import multiprocessing
import sys

from mpidp.runtime.environment import launched


def is_worker_process() -> bool:
    """Return True in a process that multiprocessing started, with any start method. Independent."""
    if multiprocessing.parent_process() is not None:
        return True
    # A process of spawn or forkserver imports the program before it has a parent process. The server of forkserver never has one.
    inheriting = getattr(multiprocessing.current_process(), "_inheriting", False)
    return inheriting or any(word.startswith("from multiprocessing.") for word in sys.orig_argv)


def keep_mpi_off_in_workers() -> None:
    """Make `from mpi4py import MPI` not start MPI in a worker process of a job. Without a launcher, such a process may be an MPI
    job of one rank. Independent."""
    if launched() and is_worker_process():
        import mpi4py

        mpi4py.rc.initialize = False

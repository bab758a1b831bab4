"""Starts MPI, and raises exceptions on all ranks together."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpi4py import MPI

from mpidp.errors import CheckpointError, DataError, MpidpError, Stopped, UsageError
from mpidp.runtime.environment import launched_size

_BY_CODE = {kind.exit_code: kind for kind in (UsageError, DataError, CheckpointError, Stopped)}


def start_mpi() -> MPI.Intracomm:
    """Start MPI and return COMM_WORLD. Raises UsageError if the launcher started N ranks but MPI sees N jobs of one rank. Also
    raises UsageError in a process that is not a rank, such as a worker process. Collective over COMM_WORLD."""
    if not MPI.Is_initialized():
        raise UsageError(
            "MPI is not initialized in this process. A process that multiprocessing started, e.g. a worker of a DataLoader, is "
            "not a rank and cannot use MPI. Call this function in the main process. Another possible cause is that the program "
            "set mpi4py.rc.initialize = False"
        )
    world = MPI.COMM_WORLD
    if world.size == 1 and launched_size() > 1:
        library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\x00 ")
        raise UsageError(
            f"{launched_size()} ranks were started, but each is alone (rank 0 of 1), because the launcher does not belong to the "
            f"MPI library ({library}). Use the mpirun of that library (`mpirun -np {launched_size()} python -m mpidp.train`), or "
            "let srun use the interface of that library: `srun --mpi=pmix` for Open MPI, `srun --mpi=pmi2` for MPICH and Intel "
            "MPI. If several MPI libraries are installed, MPI4PY_MPIABI=openmpi or MPI4PY_MPIABI=mpich selects the library "
            "that mpi4py loads."
        )
    return world


def polite_barrier(comm: MPI.Intracomm, waiting: Callable[[], None] = lambda: None) -> None:
    """Wait until all ranks have called this function. Waiting ranks sleep, so they do not use the cores of working ranks.
    `waiting`: a function that is called before each pause. Collective over comm."""
    request = comm.Ibarrier()
    pause = 1e-5
    while not request.Test():
        waiting()
        time.sleep(pause)
        pause = min(0.01, 2 * pause)


@contextmanager
def raise_together(comm: MPI.Intracomm) -> Iterator[None]:
    """Run the body of a `with` statement. If the body raises an exception on any rank, an MpidpError is raised on all ranks.
    Ranks that finish early sleep until all have finished.

    The body must not communicate. Collective over comm."""
    own_error: Exception | None = None
    try:
        yield
    except Exception as error:
        own_error = error
    known = isinstance(own_error, MpidpError)
    text = None if own_error is None else str(own_error) if known else "".join(traceback.format_exception(own_error))
    polite_barrier(comm)
    errors = comm.allgather(None if own_error is None else (getattr(own_error, "exit_code", 1), known, text))
    failed = [(rank, error) for rank, error in enumerate(errors) if error is not None]
    if not failed:
        return
    rank, (code, known, text) = failed[0]
    place = f"rank {rank}: " if comm.size > 1 and len(failed) < comm.size else ""
    raise error_of(code, place + text) from own_error


def error_of(code: int, message: str) -> MpidpError:
    """Return an error with this exit code and message, marked as an error of all ranks. Pure."""
    return _BY_CODE.get(code, MpidpError).on_every_rank(message)

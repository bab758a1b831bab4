"""Start MPI, refuse jobs that fell apart into singletons, and know who sits where."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mpi4py import MPI

from mpidp.errors import CheckpointError, DataError, MpidpError, Stopped, UsageError
from mpidp.runtime.environment import launched_size

_BY_CODE = {kind.exit_code: kind for kind in (UsageError, DataError, CheckpointError, Stopped)}


def start_mpi() -> MPI.Intracomm:
    """COMM_WORLD, after refusing N jobs of one rank that were meant to be one job of N. Collective over COMM_WORLD."""
    world = MPI.COMM_WORLD
    if world.size == 1 and launched_size() > 1:
        library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\x00 ")
        raise UsageError(
            f"{launched_size()} ranks were started, but each is alone (rank 0 of 1): the launcher and the MPI library "
            f"({library}) do not know each other. Start with the mpirun of that library (`mpirun -np {launched_size()} "
            "python -m mpidp.train`), or name its interface: `srun --mpi=pmix` for Open MPI, `srun --mpi=pmi2` for MPICH."
        )
    return world


def polite_barrier(comm: MPI.Intracomm) -> None:
    """A barrier that sleeps, so that ranks which wait long do not take the cores of those that work. Collective over comm."""
    request = comm.Ibarrier()
    pause = 1e-5
    while not request.Test():
        time.sleep(pause)
        pause = min(0.01, 2 * pause)


@contextmanager
def raise_together(comm: MPI.Intracomm) -> Iterator[None]:
    """An exception in the body on any rank is raised on every rank; ranks that are done sooner sleep.

    The body must not communicate. Collective over comm."""
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    known = isinstance(mine, MpidpError)
    word = None if mine is None else str(mine) if known else "".join(traceback.format_exception(mine))
    polite_barrier(comm)
    words = comm.allgather(None if mine is None else (getattr(mine, "exit_code", 1), known, word))
    failed = [(rank, said) for rank, said in enumerate(words) if said is not None]
    if not failed:
        return
    rank, (code, known, word) = failed[0]
    place = f"rank {rank}: " if comm.size > 1 and len(failed) < comm.size else ""
    raise _BY_CODE.get(code, MpidpError).on_every_rank(place + word) from mine

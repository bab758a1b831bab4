"""Start MPI, and let all ranks raise an exception together."""

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
    """Return COMM_WORLD. Raises UsageError if N ranks were launched, but each of them is a job of one rank. Collective over
    COMM_WORLD."""
    world = MPI.COMM_WORLD
    if world.size == 1 and launched_size() > 1:
        library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\x00 ")
        raise UsageError(
            f"{launched_size()} ranks were started, but each is alone (rank 0 of 1): the launcher and the MPI library "
            f"({library}) do not fit together. Start with the mpirun of that library (`mpirun -np {launched_size()} python -m "
            "mpidp.train`), or with the interface that it needs: `srun --mpi=pmix` for Open MPI, `srun --mpi=pmi2` for MPICH."
        )
    return world


def polite_barrier(comm: MPI.Intracomm) -> None:
    """Synchronize like a barrier, but sleep while waiting, so that the cores stay free for other ranks. Collective over comm."""
    request = comm.Ibarrier()
    pause = 1e-5
    while not request.Test():
        time.sleep(pause)
        pause = min(0.01, 2 * pause)


@contextmanager
def raise_together(comm: MPI.Intracomm) -> Iterator[None]:
    """Raise an exception of any rank's body on every rank. Ranks that finish early sleep until the others have finished.

    The body must not communicate. Collective over comm."""
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    known = isinstance(own, MpidpError)
    text = None if own is None else str(own) if known else "".join(traceback.format_exception(own))
    polite_barrier(comm)
    outcomes = comm.allgather(None if own is None else (getattr(own, "exit_code", 1), text))
    failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome is not None]
    if not failed:
        return
    rank, (code, text) = failed[0]
    place = f"rank {rank}: " if comm.size > 1 and len(failed) < comm.size else ""
    raise _BY_CODE.get(code, MpidpError).on_every_rank(place + text) from own

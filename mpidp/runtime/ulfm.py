"""Recovery from failed ranks with MPI's User-Level Failure Mitigation (ULFM), as in Open MPI (`mpirun --with-ft ulfm`).

A rank that detects a failure revokes its communicators. Then every rank that waits in one of these communicators gets an error,
too. Some operations must succeed on all remaining ranks or on none. At the end of such an operation, all remaining ranks call
MPI_Comm_agree, and all get the same result. No rank gets the result before all remaining ranks have made the call. After a
failure, the result is false.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import cast

import numpy as np
from mpi4py import MPI

from mpidp.errors import MpidpError
from mpidp.runtime.environment import launched_with_ulfm

_revocable: list[MPI.Intracomm] = []  # communicators in which other ranks may wait for this rank


class RankFailure(Exception):
    """A rank has failed. All remaining ranks raise this exception at the same point of the program."""


def revocable(comm: MPI.Intracomm) -> MPI.Intracomm:
    """Register a communicator, so that revoke() revokes it after a failure. Return the communicator. Independent."""
    if launched_with_ulfm():
        _revocable.append(comm)
    return comm


def revoke() -> None:
    """Revoke the communicators that this rank has registered. On all ranks, current and later calls in these communicators then
    fail. Independent."""
    for comm in _revocable:
        if comm not in (MPI.COMM_NULL, MPI.COMM_SELF):
            with suppress(MPI.Exception):
                comm.Revoke()


def is_failure(error: BaseException) -> bool:
    """Return whether `error` means that a rank has failed and that the remaining ranks can continue. Independent."""
    return launched_with_ulfm() and isinstance(error, (RankFailure, MPI.Exception))


def agree(comm: MPI.Intracomm, ok: bool) -> bool:
    """Return True if no rank failed and `ok` is true on all ranks. All remaining ranks get the same result. Collective over
    comm."""
    try:
        return bool(comm.Agree(int(ok)))
    except MPI.Exception:  # a rank failed
        return False


def agree_on_flags(comm: MPI.Intracomm, flags: int) -> int:
    """Return the bitwise AND of the `flags` of all remaining ranks. The result is valid and equal on these ranks even if ranks
    have failed. Waiting ranks sleep. Collective over comm."""
    common, pause = np.array([flags], dtype=np.intc), 1e-5
    request = comm.Iagree(common)
    with suppress(MPI.Exception):  # a rank has failed; the result is valid
        while not request.Test():
            time.sleep(pause)
            pause = min(0.01, 2 * pause)
    return int(common[0])


@contextmanager
def commit(comm: MPI.Intracomm) -> Iterator[None]:
    """Run the body of a `with` statement. If a rank fails, or if MPI fails in the body on any rank, RankFailure is raised on all
    remaining ranks. An MpidpError that all ranks raise is raised unchanged. If the job was started without ULFM, only run the
    body. Collective over comm."""
    if not launched_with_ulfm():
        yield
        return
    known: MpidpError | None = None
    failure: MPI.Exception | None = None
    try:
        yield
    except MpidpError as error:
        if not error.everywhere:
            raise
        known = error
    except MPI.Exception as error:
        failure = error
        revoke()
    if not agree(comm, failure is None):
        revoke()
        raise RankFailure(str(failure or known or "a rank failed")) from failure
    if known is not None:
        raise known


def shrink(comm: MPI.Intracomm) -> MPI.Intracomm:
    """Return a communicator of the remaining ranks, in the order of `comm`. Call shrink() after a RankFailure. Collective over
    comm."""
    left = cast(MPI.Intracomm, comm.Shrink())
    _revocable.clear()
    return revocable(left)

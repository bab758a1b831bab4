"""Going on without ranks that died: MPI's User-Level Failure Mitigation, as Open MPI has it (`mpirun --with-ft ulfm`).

A rank that meets a failure revokes its communicators, so that nobody waits for it in one of them. What must happen on all who are
left or on none is decided by an agreement, which no death can split. Between two agreements a rank may be as far as the next one
and no further: whoever goes on after a failure has taken part in just one more, which said no.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import cast

from mpi4py import MPI

from mpidp.errors import MpidpError
from mpidp.runtime.environment import launched_with_ulfm

_made: list[MPI.Intracomm] = []  # communicators in which others may wait for this rank


class RankFailure(Exception):
    """A rank died: all who are left hold this, at the same agreement."""


def revocable(comm: MPI.Intracomm) -> MPI.Intracomm:
    """The same communicator, which a failure will revoke. Independent."""
    if launched_with_ulfm():
        _made.append(comm)
    return comm


def revoke() -> None:
    """Whoever waits in a communicator of this rank's, or comes to wait there, meets the failure too. Independent."""
    for comm in _made:
        if comm not in (MPI.COMM_NULL, MPI.COMM_SELF):
            with suppress(MPI.Exception):
                comm.Revoke()


def is_failure(error: BaseException) -> bool:
    """Is it one after which others can go on? Independent."""
    return launched_with_ulfm() and isinstance(error, (RankFailure, MPI.Exception))


def agree(comm: MPI.Intracomm, ok: bool) -> bool:
    """Has nobody died, and says every rank yes? The same answer on all who are left. Collective over comm."""
    try:
        return bool(comm.Agree(int(ok)))
    except MPI.Exception:  # somebody died
        return False


@contextmanager
def commit(comm: MPI.Intracomm) -> Iterator[None]:
    """Run the body: it succeeds on all ranks, or RankFailure is raised on all. An error that all ranks raise passes through. Does
    nothing unless mpirun was started with ULFM. Collective over comm."""
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
        raise RankFailure(str(failure or known or "a rank died")) from failure
    if known is not None:
        raise known


def shrink(comm: MPI.Intracomm) -> MPI.Intracomm:
    """Those who are left, in their order; all others' communicators are gone. Collective over comm, after a RankFailure."""
    left = cast(MPI.Intracomm, comm.Shrink())
    _made.clear()
    return revocable(left)

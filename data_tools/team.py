"""The ranks that prepare a corpus together, or a single process without MPI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")


class Team:
    """The ranks of a communicator. If comm is None, the team is a single process."""

    def __init__(self, comm: MPI.Intracomm | None) -> None:
        self.comm = comm
        self.rank, self.size = (0, 1) if comm is None else (comm.rank, comm.size)

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Return a context. If its body raises an exception on any rank, all ranks raise an exception at its end. Ranks that
        finish early sleep until the others have finished. Collective over comm."""
        if self.comm is None:
            yield
            return
        from mpidp.runtime.world import raise_together

        with raise_together(self.comm):
            yield

    def bcast(self, value: T | None) -> T:
        """Return rank 0's value on all ranks. Collective over comm."""
        return value if self.comm is None else self.comm.bcast(value)  # type: ignore[return-value]

    def allgather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order. Collective over comm."""
        return [value] if self.comm is None else self.comm.allgather(value)

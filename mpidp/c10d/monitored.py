"""A barrier that names the missing ranks, like torch.distributed.monitored_barrier of the backend gloo. All ranks report to rank
0."""

from __future__ import annotations

import time

import numpy as np
from mpi4py import MPI


def monitored_barrier(comm: MPI.Intracomm, number: int, seconds: float, wait_all_ranks: bool, tag: int) -> None:
    """Wait until all ranks have called this function. Raises RuntimeError on every rank that called it if a rank is missing after
    `seconds`. Collective over comm.

    The error on rank 0 names the first missing rank, or all missing ranks if `wait_all_ranks` is true. `number`: the number of
    this barrier in the group, counted from 1. `tag`: a tag that no other messages use.
    """
    end = time.monotonic() + seconds
    message, milliseconds = np.array([number]), round(1000 * seconds)
    if comm.rank:
        requests = [comm.Isend(message, 0, tag)]
        received = np.zeros_like(message)
        while received[0] < number:  # skips late answers to earlier barriers that timed out
            answer = comm.Irecv(received, 0, tag)
            if not _wait_for(answer, end):
                answer.Cancel()
                answer.Wait()
                raise RuntimeError(
                    f"Rank {comm.rank} successfully reached monitoredBarrier, but received errors while waiting for send/recv "
                    f"from rank 0. Please check rank 0 logs for faulty rank. (mpi4py: no answer within {milliseconds} ms)"
                )
        MPI.Request.Waitall(requests)
        return
    if seconds <= 0:
        raise RuntimeError(f"[Rank 0]: Rank 0 timed out in monitoredBarrier after {milliseconds} ms")
    missing = [rank for rank in range(1, comm.size) if not _reported(comm, rank, number, end, tag)] if wait_all_ranks else next(
        ([rank] for rank in range(1, comm.size) if not _reported(comm, rank, number, end, tag)), []
    )
    if missing:
        whom = f"Ranks {', '.join(map(str, missing))}" if wait_all_ranks else f"Rank {missing[0]}"
        raise RuntimeError(f"[Rank 0]: {whom} failed to pass monitoredBarrier in {milliseconds} ms")
    MPI.Request.Waitall([comm.Isend(message, rank, tag) for rank in range(1, comm.size)])


def _reported(comm: MPI.Intracomm, rank: int, number: int, end: float, tag: int) -> bool:
    """Return True if `rank` reports that it has reached barrier `number`. Return False if no such report arrives before
    time.monotonic() reaches `end`. Collective over `rank` and this rank."""
    received = np.zeros(1, dtype=int)
    while received[0] < number:
        report = comm.Irecv(received, rank, tag)
        if not _wait_for(report, end):
            report.Cancel()
            report.Wait()
            return False
    return True


def _wait_for(request: MPI.Request, end: float) -> bool:
    """Return True when the request completes, or False if it is not complete when time.monotonic() reaches `end`.
    Independent."""
    pause = 2e-5
    while not request.Test():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(1e-3, 2 * pause)
    return True

"""A barrier that says who did not come, as gloo has it (torch.distributed.monitored_barrier): everybody reports to rank 0."""

from __future__ import annotations

import time

import numpy as np
from mpi4py import MPI


def monitored_barrier(comm: MPI.Intracomm, number: int, seconds: float, wait_all_ranks: bool, tag: int) -> None:
    """number: of this barrier in the group; tag: of no other messages. RuntimeError at rank 0, which names a rank that has not
    come after that time, or with wait_all_ranks all of them; and then at the others, which rank 0 lets wait. Collective over
    comm."""
    end = time.monotonic() + seconds
    word, milliseconds = np.array([number]), round(1000 * seconds)
    if comm.rank:
        requests = [comm.Isend(word, 0, tag)]
        heard = np.zeros_like(word)
        while heard[0] < number:  # answers to barriers that were given up may lie before it
            answer = comm.Irecv(heard, 0, tag)
            if not _done(answer, end):
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
    missing = [rank for rank in range(1, comm.size) if not _came(comm, rank, number, end, tag)] if wait_all_ranks else next(
        ([rank] for rank in range(1, comm.size) if not _came(comm, rank, number, end, tag)), []
    )
    if missing:
        whom = f"Ranks {', '.join(map(str, missing))}" if wait_all_ranks else f"Rank {missing[0]}"
        raise RuntimeError(f"[Rank 0]: {whom} failed to pass monitoredBarrier in {milliseconds} ms")
    MPI.Request.Waitall([comm.Isend(word, rank, tag) for rank in range(1, comm.size)])


def _came(comm: MPI.Intracomm, rank: int, number: int, end: float, tag: int) -> bool:
    """Has this rank reported to this barrier? Collective over the two."""
    heard = np.zeros(1, dtype=int)
    while heard[0] < number:
        report = comm.Irecv(heard, rank, tag)
        if not _done(report, end):
            report.Cancel()
            report.Wait()
            return False
    return True


def _done(request: MPI.Request, end: float) -> bool:
    """Independent."""
    pause = 2e-5
    while not request.Test():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(1e-3, 2 * pause)
    return True

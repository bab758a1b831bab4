"""Spare ranks, which live but fill no replica of the mesh. They wait until an attempt of the training ranks has ended.

Every training rank tells every spare rank how the attempt ended, so that a spare rank learns it from any rank that is still
alive. If a training rank fails, the other training ranks revoke the communicator instead.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from mpi4py import MPI

from mpidp.errors import Damaged, MpidpError
from mpidp.runtime.ulfm import RankFailure

TAG = 7_000  # tags of messages to spare ranks begin here
POLL_SECONDS = 0.01
MOST_WORDS = 800  # characters of an error message; a message to a spare rank must be so short that sending it never waits


def tell(world: MPI.Intracomm, spares: Sequence[int], attempt: int, outcome: bool | MpidpError) -> None:
    """Tell the spare ranks how an attempt ended. outcome: whether the run is over, or the error that all ranks raise. attempt:
    number of the attempt since the ranks were arranged. Independent."""
    if isinstance(outcome, MpidpError):
        short = type(outcome).on_every_rank(str(outcome)[:MOST_WORDS])
        if isinstance(outcome, Damaged) and isinstance(short, Damaged):
            short.next_batch = outcome.next_batch
        outcome = short
    for spare in spares:
        with suppress(MPI.Exception):  # the spare rank has failed
            world.send(outcome, spare, TAG + attempt)


def wait(world: MPI.Intracomm, training: Sequence[int], attempt: int) -> bool:
    """Wait until an attempt of the training ranks has ended. Return whether the run is over, and raise the error that ended the
    attempt. Raises RankFailure if ranks have failed. Independent."""
    sources = list(training)
    while sources and not world.Is_revoked():
        for source in list(sources):
            try:
                if not world.Iprobe(source, TAG + attempt):
                    continue
                outcome = world.recv(source=source, tag=TAG + attempt)
            except MPI.Exception:  # this rank has failed, or the communicator is revoked
                sources.remove(source)
                continue
            if isinstance(outcome, MpidpError):
                raise outcome
            return bool(outcome)
        time.sleep(POLL_SECONDS)
    raise RankFailure("a rank failed")

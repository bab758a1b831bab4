"""Spare ranks: living ranks that fill no replica of the mesh. They wait until an attempt of the training ranks has ended.

At the end of an attempt, all living ranks agree on its outcome. Therefore spare ranks and training ranks continue in the same
way, even if a training rank fails at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mpi4py import MPI

from mpidp.errors import Damaged, MpidpError
from mpidp.runtime.ulfm import RankFailure, agree_on_flags
from mpidp.runtime.world import error_of

FAILED, OVER, GROW, RETURN, ERROR = 0, 1, 2, 3, 16  # outcomes; ERROR + exit code: the error that all training ranks raise
SPARE = -1  # all bits are set, so a bitwise AND gives the outcome of the training ranks


@dataclass(frozen=True)
class Ended:
    """The outcome of an attempt without an error. It is the same on all living ranks, except that `record` is empty on spare
    ranks."""

    over: bool  # whether the run is over
    grow: bool  # whether the job first needs more ranks
    record: dict[str, Any]


def attempt(
    world: MPI.Intracomm, first: int, train: Callable[[], dict[str, Any] | None] | None, can_return: Callable[[Damaged], bool]
) -> Ended:
    """Call `train` on the training ranks. On spare ranks, `train` must be None, and this function waits. Return the outcome on
    all ranks, or raise the error of the training ranks. `first`: the first training rank. `can_return`: whether the run can
    return to its last checkpoint after a Damaged error. If so, spare ranks do not raise this error. Raises RankFailure if
    training ranks fail. Collective over world."""
    code, end = SPARE, None
    error: Exception | None = None
    if train is not None:
        try:
            end = train()
            code = GROW if end is None else OVER
        except RankFailure as failure:
            code, error = FAILED, failure
        except MpidpError as known:
            if not known.everywhere:
                raise
            code = RETURN if isinstance(known, Damaged) and can_return(known) else ERROR + known.exit_code
            error = known
    code = agree_on_flags(world, code)
    if code in (FAILED, SPARE):  # SPARE: no training rank is left
        raise RankFailure(str(error or "a rank failed")) from error
    if code >= ERROR:
        text = str(error or "the run has ended with an error")
        with suppress(MPI.Exception):  # a rank may fail at the end
            text = world.bcast(text, root=first)
        error = error or error_of(code - ERROR, text)
    if error is not None:
        raise error
    return Ended(code == OVER, code == GROW, end or {})

"""The order of forwards and backwards of one step, as data. Pure.

With one stage, gradient accumulation is a forward and a backward a micro-batch; pipelines will be other schedules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """Forward and backward of micro-batch v; last: no later backward of this step touches the gradients."""

    v: int
    last: bool


def accumulate(micro_batches: Sequence[int]) -> Iterator[Instruction]:
    """One stage: the micro-batches of this rank's lanes in order."""
    for i, v in enumerate(micro_batches):
        yield Instruction(v, last=i + 1 == len(micro_batches))


def one_by_one(micro_batches: Iterable[int]) -> Iterator[Instruction]:
    """One stage, where it is not known before what comes: none is said to be the last."""
    for v in micro_batches:
        yield Instruction(v, last=False)

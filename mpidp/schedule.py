"""The order of forwards and backwards of one step, as data. Pure.

A pipeline of S stages runs 1F1B (Narayanan 2021, "PipeDream-Flush"; Megatron-LM, section 2.2): stage s begins with S - 1 - s
forwards, then alternates a forward and a backward, and ends with the backwards that are left. Gradient accumulation is the case
of one stage. Backwards come in the order of micro-batches at every stage, so sums are those of one rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Forward:
    """Of micro-batch v."""

    v: int


@dataclass(frozen=True)
class Backward:
    """Of micro-batch v; last: no later backward of this step touches the gradients."""

    v: int
    last: bool


Instruction = Forward | Backward


def one_f_one_b(micro_batches: Sequence[int], stage: int = 0, stages: int = 1) -> Iterator[Instruction]:
    """Stage `stage` of `stages`: the micro-batches of this replica's lanes in order, at most stages - stage in flight. Pure."""
    ahead = min(stages - 1 - stage, len(micro_batches))
    for v in micro_batches[:ahead]:
        yield Forward(v)
    for i, v in enumerate(micro_batches):
        if i + ahead < len(micro_batches):
            yield Forward(micro_batches[i + ahead])
        yield Backward(v, last=i + 1 == len(micro_batches))


def one_by_one(micro_batches: Iterable[int]) -> Iterator[Instruction]:
    """One stage, where it is not known before what comes: none is said to be the last."""
    for v in micro_batches:
        yield Forward(v)
        yield Backward(v, last=False)

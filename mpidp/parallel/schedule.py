"""The order of forwards and backwards of one step, as data. Pure.

A pipeline of S stages runs 1F1B (Narayanan 2021, "PipeDream-Flush"; Megatron-LM, section 2.2): stage s begins with S - 1 - s
forwards, then alternates a forward and a backward, and ends with the backwards that are left. Gradient accumulation is the case
of one stage. Backwards come in the order of micro-batches at every stage, so sums are those of one rank.

Interleaved (Narayanan 2021, section 2.2), each stage has several runs of layers, chunks: chunk c of stage s comes before chunk c
of stage s + 1, and that of the last stage before chunk c + 1 of the first. A bubble is then a chunk long, not a stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Forward:
    """Of micro-batch v through a chunk of the stage's layers."""

    v: int
    chunk: int = 0


@dataclass(frozen=True)
class Backward:
    """Of micro-batch v; last: no later backward of this step touches the gradients."""

    v: int
    last: bool
    chunk: int = 0


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


def interleaved(micro_batches: Sequence[int], stage: int, stages: int, chunks: int) -> Iterator[Instruction]:
    """1F1B over chunks: micro-batches pass in groups, one for each stage or a few more, and a group is through a chunk before
    it comes to the next. Any number of micro-batches: Narayanan's groups are of exactly as many as there are stages, and wait
    for ever when the last is smaller. Each chunk sees micro-batches in their order. Pure."""
    count = len(micro_batches)
    parts = max(1, count // stages)
    groups = [micro_batches[i * count // parts : (i + 1) * count // parts] for i in range(parts)]
    forwards = [(v, chunk) for group in groups for chunk in range(chunks) for v in group]
    backwards = [(v, chunk) for group in groups for chunk in reversed(range(chunks)) for v in group]
    ahead = min(2 * (stages - 1 - stage) + (chunks - 1) * max(map(len, groups)), len(forwards))
    for v, chunk in forwards[:ahead]:
        yield Forward(v, chunk)
    for i, (v, chunk) in enumerate(backwards):
        if i + ahead < len(forwards):
            yield Forward(*forwards[i + ahead])
        yield Backward(v, i + 1 == len(backwards), chunk)


def one_by_one(micro_batches: Iterable[int]) -> Iterator[Instruction]:
    """One stage, where it is not known before what comes: none is said to be the last."""
    for v in micro_batches:
        yield Forward(v)
        yield Backward(v, last=False)

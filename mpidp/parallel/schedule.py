"""The order of forward and backward passes in one step, as a list of instructions. Pure.

A pipeline of S stages runs the schedule 1F1B (PipeDream-Flush, Narayanan 2021; Megatron-LM, Narayanan 2021, section 2.2). Stage s
begins with S - 1 - s forward passes, then alternates forward and backward passes, and ends with the remaining backward passes.
With one stage, the schedule is plain gradient accumulation. Every stage runs backward passes in the order of micro-batches, so
gradient sums have the same bits as on one rank.

In the interleaved schedule (Megatron-LM, section 2.2), each stage has several ranges of layers, called chunks. Chunk c of stage s
is followed by chunk c of stage s + 1. Chunk c of the last stage is followed by chunk c + 1 of the first stage. The idle time at
the start and the end of a step (the bubble) is proportional to the size of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Forward:
    """The forward pass of micro-batch `v` through chunk `chunk` of the stage's layers."""

    v: int
    chunk: int = 0


@dataclass(frozen=True)
class Backward:
    """The backward pass of micro-batch `v` through chunk `chunk`. last: whether this is the rank's last backward pass of the
    step."""

    v: int
    last: bool
    chunk: int = 0


Instruction = Forward | Backward


def one_f_one_b(micro_batches: Sequence[int], stage: int = 0, stages: int = 1) -> Iterator[Instruction]:
    """Yield the 1F1B schedule of stage `stage` for this replica's micro-batches. At any time, at most (stages - stage)
    micro-batches wait for their backward pass. Pure."""
    ahead = min(stages - 1 - stage, len(micro_batches))
    for v in micro_batches[:ahead]:
        yield Forward(v)
    for i, v in enumerate(micro_batches):
        if i + ahead < len(micro_batches):
            yield Forward(micro_batches[i + ahead])
        yield Backward(v, last=i + 1 == len(micro_batches))


def interleaved(micro_batches: Sequence[int], stage: int, stages: int, chunks: int) -> Iterator[Instruction]:
    """Yield the interleaved 1F1B schedule of stage `stage`. Micro-batches are computed in groups. A group passes through one
    chunk before it enters the next chunk. All groups have about the same number of micro-batches, which is at least `stages`.
    If there are fewer than `stages` micro-batches, they form one group. The number of micro-batches need not be a multiple of
    `stages`. Each chunk computes the micro-batches in order. Pure."""
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
    """Yield the schedule of a pipeline with one stage. Use it if the micro-batches are not known in advance. No backward pass is
    marked as the last. Pure."""
    for v in micro_batches:
        yield Forward(v)
        yield Backward(v, last=False)

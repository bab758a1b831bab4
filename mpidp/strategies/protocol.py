"""What train.fit asks of a strategy. A new method is a new file that keeps to this; the loop gets no branch for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any, Protocol

from mpi4py import MPI
from torch import Tensor

from mpidp.checkpoint.entry import Entry
from mpidp.comm.group import Group
from mpidp.parallel.engine import Accumulates
from mpidp.reducers.base import Look, Reducer


@dataclass(frozen=True)
class StepStats:
    """What an update came to: the norm of the averaged gradient before clipping (0 where none was due yet); skipped when it was
    not finite or above the limit, or when no target token was in the batch."""

    grad_norm: float
    skipped: bool
    told: Mapping[str, Any] = field(default_factory=dict)  # more for the step's line


@dataclass(frozen=True)
class Options:
    """What a strategy may be told beside its parts; each takes what concerns it. The settings of section strategy, and facts."""

    sync_every: int = 1  # steps
    meet_every: int = 1  # steps
    total_steps: int = 0
    staleness: int = 1
    quorum: float = 1.0  # of the lanes
    compensation: float = 0.0
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    overlap: bool = False
    fragments: int = 1
    group: str = "all"
    group_size: int = 2
    servers: int = 0  # the last ranks
    mode: str = "async"
    arrivals: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict)  # to be repeated (arrivals.py)
    nodes: Sequence[Sequence[int]] = ()  # the ranks of each node

    @classmethod
    def of(cls, settings: Mapping[str, Any], total_steps: int, node_sizes: Sequence[int], **more: Any) -> Options:
        """From the settings of section strategy. Pure."""
        first = list(accumulate(node_sizes, initial=0))
        nodes = [range(at, at + size) for at, size in zip(first, node_sizes, strict=False)]
        known = {key: value for key, value in settings.items() if key in {one.name for one in fields(cls)}}
        return cls(**known, total_steps=total_steps, nodes=nodes, **more)


class Strategy(Accumulates, Protocol):
    """How gradients become updates, together."""

    compute_comm: MPI.Intracomm  # the ranks that share the lanes
    meets_always: bool  # at every step
    group: Group
    one_copy: bool  # of parameters and state in a group
    reducer: Reducer
    buffer: Any  # of flat gradients, a GradientBuffer; None where there is none
    goes_on: bool  # after a death, in the same memory; else from the last checkpoint

    def meets(self, step: int) -> bool:
        """Do all ranks tell each other at this step (from 1) what they computed, and hold one common model after it? Only then is
        there an evaluation, a checkpoint, an end. The same on every rank. Independent."""

    def fill(self, forwards: int) -> None:
        """Run so many more forwards, where every rank must run as many as any rank. Collective where there are any."""

    def start(self) -> None:
        """Once, before the first step or after a restore. Collective over compute_comm."""

    def watch(self, looks: Sequence[Look]) -> None:
        """In the step that begins, show each of these every lane that this rank computes. Independent."""

    def discard(self) -> None:
        """Forget the gradients of the step that has begun: it is done again. Independent."""

    def step(self, lr: float, tokens: int, limit: float = math.inf) -> StepStats:
        """Turn the step's gradients into an update; tokens: target tokens of the global batch, or of this rank's part of it where
        ranks do not meet every step; limit: of the gradient's norm, beyond which there is none. Collective."""

    def finish(self) -> None:
        """Drain what is in flight: afterwards there is one common model. Collective."""

    def state_dict(self) -> dict[str, Entry]:
        """Everything but the parameters that an exact resume needs. Independent."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Independent."""

    def leave(self) -> None:
        """Ranks have died: let go of the parameters, for another strategy that goes on with them. May be called again.
        Independent."""

    def go_on_from(self, before: Any) -> None:
        """Of those who are left of another strategy's ranks, in whose memory this one works: go on where that one stood. When
        somebody dies meanwhile, all is as before. Collective over compute_comm."""

    def take_over(self, before: Any) -> None:
        """Rank 0 and others had the state of another strategy, `before`; None: this rank is new. Now all have rank 0's, and what
        is each rank's own is of those who had it. When somebody dies meanwhile, `before` is as before. Collective over
        compute_comm."""

    def flats(self) -> dict[str, Tensor]:
        """The flat tensors on which all replicas agree, by suffix of their names. Independent."""

    def close(self) -> None:
        """Give shared memory back: parameters and state are gone with it. Collective over compute_comm."""

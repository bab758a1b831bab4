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
from mpidp.config.defaults import DEFAULTS
from mpidp.parallel.engine import GradientSink
from mpidp.reducers.base import LaneObserver, Reducer


@dataclass(frozen=True)
class StepStats:
    """What an update came to: the norm of the averaged gradient before clipping (0 where none was due yet); skipped when it was
    not finite or above the limit, or when no target token was in the batch."""

    grad_norm: float
    skipped: bool
    extra: Mapping[str, Any] = field(default_factory=dict)  # more for the step's line


@dataclass(frozen=True)
class StrategyOptions:
    """The settings of section strategy, resolved, and facts about the run. Defaults and meanings are in config/settings.py and
    config/defaults.py; each strategy reads the settings that it knows."""

    sync_every: int  # steps
    meet_every: int  # steps between synchronization points
    staleness: int
    quorum: float  # fraction of the lanes
    compensation: float
    outer_lr: float
    outer_momentum: float
    overlap: bool
    fragments: int
    group: str
    group_size: int
    servers: int  # the last ranks are servers
    mode: str
    total_steps: int = 0
    arrivals: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict)  # the order to replay (arrivals.py)
    nodes: Sequence[Sequence[int]] = ()  # the ranks of each node

    @classmethod
    def of(
        cls, settings: Mapping[str, Any] = DEFAULTS, total_steps: int = 0, node_sizes: Sequence[int] = (), **more: Any
    ) -> StrategyOptions:
        """Return the options for the settings of section strategy. Pure."""
        first = list(accumulate(node_sizes, initial=0))
        nodes = [range(at, at + size) for at, size in zip(first, node_sizes, strict=False)]
        known = {key: value for key, value in settings.items() if key in {one.name for one in fields(cls)}}
        return cls(**known, total_steps=total_steps, nodes=nodes, **more)


class Strategy(GradientSink, Protocol):
    """How gradients become updates, together."""

    compute_comm: MPI.Intracomm  # the ranks that share the lanes
    synchronizes_always: bool  # at every step
    group: Group
    one_copy: bool  # of parameters and state in a group
    reducer: Reducer
    buffer: Any  # of flat gradients, a GradientBuffer; None where there is none
    survives_failures: bool  # after a death, in the same memory; else from the last checkpoint

    def synchronizes_at(self, step: int) -> bool:
        """Do all ranks tell each other at this step (from 1) what they computed, and hold one common model after it? Only then is
        there an evaluation, a checkpoint, an end. The same on every rank. Independent."""

    def fill(self, forwards: int) -> None:
        """Run so many more forwards, where every rank must run as many as any rank. Collective where there are any."""

    def start(self) -> None:
        """Once, before the first step or after a restore. Collective over compute_comm."""

    def observe_lanes(self, observers: Sequence[LaneObserver]) -> None:
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

    def release(self) -> None:
        """Ranks have died: let go of the parameters, for another strategy that goes on with them. May be called again.
        Independent."""

    def resume_after_failure(self, before: Any) -> None:
        """Of those who are left of another strategy's ranks, in whose memory this one works: go on where that one stood. When
        somebody dies meanwhile, all is as before. Collective over compute_comm."""

    def resume_with_new_ranks(self, before: Any) -> None:
        """Rank 0 and others had the state of another strategy, `before`; None: this rank is new. Now all have rank 0's, and what
        is each rank's own is of those who had it. When somebody dies meanwhile, `before` is as before. Collective over
        compute_comm."""

    def flats(self) -> dict[str, Tensor]:
        """The flat tensors on which all replicas agree, by suffix of their names. Independent."""

    def close(self) -> None:
        """Give shared memory back: parameters and state are gone with it. Collective over compute_comm."""

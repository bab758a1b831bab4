"""The interface of strategies to the training loop. A new strategy is a new file that implements it; the loop does not change.

A *synchronization point* (in docs/methods.md: a meeting) is a step after which all ranks have one common model.
"""

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
    """The result of an update."""

    grad_norm: float  # of the averaged gradient before clipping; 0 if there was no update to make
    skipped: bool  # the gradient was not finite or above the limit, or the batch had no target tokens
    extra: Mapping[str, Any] = field(default_factory=dict)  # more entries for the step's line in metrics.jsonl


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
    """Turns gradients into parameter updates, together with the other ranks."""

    compute_comm: MPI.Intracomm  # the ranks that share the lanes
    synchronizes_always: bool  # whether every step is a synchronization point
    group: Group
    one_copy: bool  # whether a group has one copy of parameters and optimizer state
    reducer: Reducer
    buffer: Any  # the GradientBuffer; None if the strategy has none
    survives_failures: bool  # whether it can resume in memory after failed ranks; otherwise from the last checkpoint

    def synchronizes_at(self, step: int) -> bool:
        """Return whether this step (from 1) is a synchronization point: all ranks exchange their results, and have one common
        model afterwards. Only then evaluations, checkpoints and the end are possible. The same on every rank. Independent."""

    def fill(self, forwards: int) -> None:
        """Run this many dummy forward passes, if all ranks must run equally many. Collective for such strategies."""

    def start(self) -> None:
        """Prepare for the first step. Call once, after loading a checkpoint if any. Collective over compute_comm."""

    def observe_lanes(self, observers: Sequence[LaneObserver]) -> None:
        """Call each observer with every lane that this rank computes in the next step. Independent."""

    def discard(self) -> None:
        """Discard the gradients of the current step, which is run again. Independent."""

    def step(self, lr: float, tokens: int, limit: float = math.inf) -> StepStats:
        """Make an update from the step's gradients. tokens: target tokens of the global batch; if not every step is a
        synchronization point, of this rank's part. limit: gradient norm above which the update is skipped. Collective."""

    def drain(self) -> None:
        """Apply all updates in flight; afterwards all ranks have one common model. Collective."""

    def state_dict(self) -> dict[str, Entry]:
        """Return the state, besides the parameters, that an exact resume needs. Independent."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state. Independent."""

    def release(self) -> None:
        """Release the parameters after a failure of ranks, so that another strategy can use them. May be called repeatedly.
        Independent."""

    def resume_after_failure(self, before: Any) -> None:
        """Resume from the state of `before`, the strategy on the ranks before a failure. This strategy works on the remaining
        ranks in the same memory. If another rank fails meanwhile, `before` is unchanged. Collective over compute_comm."""

    def resume_with_new_ranks(self, before: Any) -> None:
        """Broadcast rank 0's state from `before`, the previous strategy (None on new ranks). Per-rank state stays with the ranks
        that had it. If a rank fails meanwhile, `before` is unchanged. Collective over compute_comm."""

    def flats(self) -> dict[str, Tensor]:
        """Return the tensors on which replicas must agree, by suffix of their names. Independent."""

    def close(self) -> None:
        """Free shared memory, and with it parameters and state. Collective over compute_comm."""

"""The interface between strategies and the training loop. A new strategy is a new file that implements this interface. The
training loop does not change.

A *meeting* is a step at which all ranks synchronize. After a meeting, all ranks have the same model.
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
    """The result of Strategy.step()."""

    grad_norm: float  # norm of the averaged gradient before clipping; 0 if no update was due
    skipped: bool  # whether no update was made: the gradient was not finite or above the limit, or there were no target tokens
    extra: Mapping[str, Any] = field(default_factory=dict)  # further entries of the step's line in metrics.jsonl


@dataclass(frozen=True)
class StrategyOptions:
    """The resolved settings of section `strategy`, and facts about the run. config/settings.py describes the settings, and
    config/defaults.py has their defaults. A strategy reads only the options that it needs."""

    sync_every: int  # steps between averages
    meet_every: int  # steps between meetings
    staleness: int  # largest delay of a gradient, in batches
    quorum: float  # an update waits for the gradients of this fraction of the lanes (sequences of micro-batches)
    compensation: float  # lambda of delay compensation
    outer_lr: float
    outer_momentum: float
    overlap: bool
    fragments: int
    group: str
    group_size: int
    servers: int  # number of servers, which are the last ranks
    mode: str  # mode of the parameter server: sync, async or ssp
    total_steps: int = 0  # number of updates of the run
    arrivals: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict)  # the arrivals to replay (arrivals.py)
    nodes: Sequence[Sequence[int]] = ()  # the ranks of each node

    @classmethod
    def of(
        cls, settings: Mapping[str, Any] = DEFAULTS, total_steps: int = 0, node_sizes: Sequence[int] = (), **more: Any
    ) -> StrategyOptions:
        """Return the options. `settings`: the settings of section strategy. `node_sizes`: number of ranks on each node. `more`:
        other fields, such as `arrivals`. Pure."""
        first = list(accumulate(node_sizes, initial=0))
        nodes = [range(at, at + size) for at, size in zip(first, node_sizes, strict=False)]
        known = {key: value for key, value in settings.items() if key in {one.name for one in fields(cls)}}
        return cls(**known, total_steps=total_steps, nodes=nodes, **more)


class Strategy(GradientSink, Protocol):
    """Makes parameter updates from the gradients of all ranks."""

    compute_comm: MPI.Intracomm  # the ranks that divide the micro-batches of a step
    synchronizes_always: bool  # whether all ranks synchronize at every step
    group: Group
    one_copy: bool  # whether ranks that share memory use one copy of parameters and optimizer state
    reducer: Reducer
    buffer: Any  # the GradientBuffer; None if the strategy has none
    survives_failures: bool  # whether a run resumes from memory after ranks failed; otherwise it resumes from a checkpoint

    def synchronizes_at(self, step: int) -> bool:
        """Return whether step number `step` (counted from 1) is a meeting, at which all ranks synchronize. Evaluations,
        checkpoints and the end of the run are possible only at meetings. The result is the same on every rank. Independent."""

    def fill(self, forwards: int, chunk: int | None = None) -> None:
        """Take part in the communication of `forwards` forward passes that other ranks compute. `chunk`: the chunk of layers
        that the other ranks compute, or None if they compute all chunks. Do nothing if forward passes of this strategy do not
        communicate. Collective over compute_comm if forward passes communicate, else independent."""

    def start(self) -> None:
        """Prepare for the first step. Call start() once. If the run resumes from a checkpoint, load the checkpoint before this
        call. Collective over compute_comm."""

    def observe_lanes(self, observers: Sequence[LaneObserver]) -> None:
        """In the next step, call each observer with the gradient of every lane (a fixed sequence of micro-batches) that this
        rank computes. Independent."""

    def discard(self) -> None:
        """Discard the gradients of the current step, so that they can be computed again. Independent."""

    def step(self, lr: float, tokens: int, limit: float = math.inf) -> StepStats:
        """Make an update from the step's gradients. `tokens`: number of target tokens in the global batch if all ranks
        synchronize at every step, else in this rank's micro-batches. `limit`: if the gradient norm is larger, the update is
        skipped. Collective over compute_comm."""

    def drain(self) -> None:
        """Apply all gradients that have not been applied yet. Afterwards all ranks have the same model. Collective over
        compute_comm."""

    def state_dict(self) -> dict[str, Entry]:
        """Return the state that an exact resume needs in addition to the parameters. Independent."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state. Independent."""

    def release(self) -> None:
        """Release the parameters after ranks have failed, so that another strategy can use them. release() may be called several
        times. Independent."""

    def resume_after_failure(self, before: Any) -> None:
        """Take over the state of `before`, the strategy that was used before ranks failed. This strategy uses the memory of
        `before`, on the remaining ranks. If another rank fails during this call, `before` is unchanged. Collective over
        compute_comm."""

    def resume_with_new_ranks(self, before: Any) -> None:
        """After new ranks have joined, take over the state that rank 0 has in `before`. `before`: the previous strategy, or None
        on new ranks. State that differs between ranks is not sent: each old rank keeps its own. If a rank fails during this call,
        `before` is unchanged. Collective over compute_comm."""

    def flats(self) -> dict[str, Tensor]:
        """Return {suffix: flat tensor} of the tensors that must be equal on all replicas. The suffix of the parameters is "", and
        that of a state tensor is its name. Independent."""

    def close(self) -> None:
        """Free the shared memory of parameters and state. Collective over compute_comm."""

"""The state of a run besides parameters and optimizer state."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from mpidp.metrics.gradient_noise import NoiseAverage
from mpidp.strategies.protocol import StepStats

REMEMBERED = 32  # number of gradient norms whose median is the usual norm
KNOWN_AFTER = 20  # after this number of updates the usual norm is known


@dataclass
class Position:
    """The position of a run. Every checkpoint contains all fields of this class."""

    step: int = 0  # updates made
    skipped: int = 0  # batches that made no update
    skipped_in_a_row: int = 0
    tokens: int = 0  # target tokens of all updates
    val_loss: float | None = None
    best_val_loss: float | None = None
    evaluations_since_best: int = 0
    evaluated_step: int = 0  # the step of the last evaluation
    noise: NoiseAverage = field(default_factory=NoiseAverage)
    norms: list[float] = field(default_factory=list)  # gradient norms of the last updates

    def __post_init__(self) -> None:
        if isinstance(self.noise, dict):  # when read from a checkpoint
            self.noise = NoiseAverage(**self.noise)

    @property
    def batch(self) -> int:
        """The number of the next global batch. The data loader needs no other state."""
        return self.step + self.skipped

    def norm_limit(self, spike: float) -> float:
        """Return the largest gradient norm with which an update is made: `spike` times the median of the last norms. The median
        hardly changes after a few unusual norms. Return infinity before KNOWN_AFTER updates, and if `spike` is 0. Independent."""
        return spike * statistics.median_low(self.norms) if spike and len(self.norms) >= KNOWN_AFTER else math.inf

    def count(self, stats: StepStats, tokens: int) -> None:
        """Count one batch, whether it led to an update or was skipped. `tokens`: its number of target tokens. Independent."""
        if stats.skipped:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        else:
            self.step, self.tokens, self.skipped_in_a_row = self.step + 1, self.tokens + tokens, 0
            self.norms = [*self.norms, *filter(None, [stats.grad_norm])][-REMEMBERED:]

    def evaluated(self, loss: float | None) -> None:
        """Record that the current step was evaluated. `loss`: val_loss, or None if there is no validation split. A loss that is
        not finite is never the best loss. Independent."""
        self.evaluated_step = self.step
        if loss is None:
            return
        best = self.best_val_loss
        better = loss < (math.inf if best is None or math.isnan(best) else best)
        self.evaluations_since_best = 0 if better else self.evaluations_since_best + 1
        self.val_loss, self.best_val_loss = loss, loss if better else self.best_val_loss

    def skip_to(self, batch: int) -> None:
        """Continue with batch number `batch`. The batches from the present position to `batch` - 1 count as skipped.
        Independent."""
        self.skipped, self.skipped_in_a_row = batch - self.step, 0


@dataclass
class RunState:
    """The state of a run besides parameters and optimizer state. A job passes it to the job that continues the run."""

    position: Position = field(default_factory=Position)
    lines: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl since the last update, on every rank
    skipped_from: int = -1  # step of the checkpoint to which the run last returned to skip batches
    stop_at: float = math.inf  # time at which to stop, in seconds since 1970, shortly before the job's time limit
    recovered: bool = False  # whether this job continues the state of a job in which ranks failed
    full: int = 0  # number of ranks when the command started; if there are fewer now, ranks have failed
    unreported: np.ndarray | None = None  # this rank's reports since the last exchange (step_report.py)
    step_seconds: float = 0.0  # duration of the steps since the last exchange of reports

    def portable(self) -> RunState:
        """Return a copy without this rank's own values. Independent."""
        return replace(self, unreported=None, step_seconds=0.0)

    def adopt(self, other: RunState) -> None:
        """Take over every value of `other`. Independent."""
        for one in fields(self):
            setattr(self, one.name, getattr(other, one.name))

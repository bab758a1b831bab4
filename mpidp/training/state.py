"""Where a run stands."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from mpidp.metrics.gradient_noise import NoiseAverage
from mpidp.strategies.protocol import StepStats

REMEMBERED = 32  # gradient norms, of which the usual one is the median

KNOWN_AFTER = 20  # updates


@dataclass
class Position:
    """Where a run stands; all of it goes into the checkpoint."""

    step: int = 0  # updates made
    skipped: int = 0  # batches that made no update
    skipped_in_a_row: int = 0
    tokens: int = 0  # target tokens learned from
    val_loss: float | None = None
    best_val_loss: float | None = None
    evaluations_since_best: int = 0
    evaluated_step: int = 0  # at which val_loss was measured
    noise: NoiseAverage = field(default_factory=NoiseAverage)
    norms: list[float] = field(default_factory=list)  # of the gradients of the last updates

    def __post_init__(self) -> None:
        if isinstance(self.noise, dict):  # as a checkpoint keeps it
            self.noise = NoiseAverage(**self.noise)

    @property
    def batch(self) -> int:
        """The next batch: the loader's whole state."""
        return self.step + self.skipped

    def norm_limit(self, spike: float) -> float:
        """The gradient norm beyond which a batch makes no update: `spike` times the median of the last ones, which a few odd ones
        do not move and which is the same bits on any machine. None at first, and when spike is 0. Independent."""
        return spike * statistics.median_low(self.norms) if spike and len(self.norms) >= KNOWN_AFTER else math.inf

    def count(self, stats: StepStats, tokens: int) -> None:
        """A batch is behind; tokens: its target tokens. Independent."""
        if stats.skipped:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        else:
            self.step, self.tokens, self.skipped_in_a_row = self.step + 1, self.tokens + tokens, 0
            self.norms = [*self.norms, *filter(None, [stats.grad_norm])][-REMEMBERED:]

    def go_on_with(self, batch: int) -> None:
        """Pass over the batches before this one. Independent."""
        self.skipped, self.skipped_in_a_row = batch - self.step, 0

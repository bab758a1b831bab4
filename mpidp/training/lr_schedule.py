"""Learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A learning rate for each step. Steps count from 1."""

    kind: str  # cosine | linear | constant | wsd
    lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1. After a linear warm-up to lr, the rate follows a cosine or linear
        decay to min_lr at the last step, or stays constant. With wsd (warmup-stable-decay, Hu 2024) it is constant, and decays
        linearly over the last fifth of the steps. Pure."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        fraction = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "constant":
            return self.lr
        if self.kind == "wsd":
            fraction = max(0.0, (fraction - 0.8) / 0.2)
        decay = 0.5 * (1 + math.cos(math.pi * fraction)) if self.kind == "cosine" else 1.0 - fraction
        return self.min_lr + (self.lr - self.min_lr) * decay

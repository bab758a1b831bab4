"""The learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SETTINGS = ("train.steps", "optim.schedule", "optim.lr", "optim.min_lr", "optim.warmup_steps")  # they define the schedule


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule. Steps are counted from 1."""

    kind: str  # cosine | linear | constant | wsd
    lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def lr_at(self, step: int) -> float:
        """Return the learning rate of step number `step`, counted from 1. In the first `warmup_steps` steps, the rate rises
        linearly to `lr`. After that, `constant` keeps the rate at `lr`, and `cosine` and `linear` lower it to `min_lr`. `wsd`
        (warmup-stable-decay, Hu 2024) keeps the rate at `lr`, and lowers it linearly in the last fifth of the remaining steps.
        As in PyTorch, the formula reaches `min_lr` one step after the last step. In the last step, the rate is therefore above
        `min_lr`. Pure."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        fraction = (step - 1 - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "constant":
            return self.lr
        if self.kind == "wsd":
            fraction = max(0.0, (fraction - 0.8) / 0.2)
        decay = 0.5 * (1 + math.cos(math.pi * fraction)) if self.kind == "cosine" else 1.0 - fraction
        return self.min_lr + (self.lr - self.min_lr) * decay


def schedule_of(settings: Mapping[str, Any]) -> Schedule:
    """Return the schedule. `settings`: resolved settings {section.key: value}. Pure."""
    steps, kind, lr, min_lr, warmup_steps = (settings[key] for key in SETTINGS)
    return Schedule(kind, lr, min_lr, warmup_steps, steps)


def change(saved: Mapping[str, Any], now: Mapping[str, Any], step: int) -> str:
    """Return a line that describes how the schedule changes when a run resumes after step `step`. Return "" if it does not
    change. `saved`, `now`: resolved settings {section.key: value} of the checkpoint and of the resumed run. Pure."""
    changed = [f"{key} {saved[key]} -> {now[key]}" for key in SETTINGS if saved[key] != now[key]]
    if not changed:
        return ""
    before = f", after {schedule_of(saved).lr_at(step):.3g} at step {step}" if step else ""
    return f"{', '.join(changed)}: the learning rate at step {step + 1} is {schedule_of(now).lr_at(step + 1):.3g}{before}"

"""Reads the losses, the gradient noise and the step times of a run from RUN/config.toml and RUN/metrics.jsonl.

This module needs neither MPI nor torch, and changes no file in RUN. It skips missing fields, and lines that a running job has not
finished writing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpidp.config.command_line import read_run_config
from mpidp.data.lanes import Lanes
from mpidp.errors import UsageError
from mpidp.metrics.gradient_noise import Noise
from mpidp.metrics.jsonl import number, read_lines
from mpidp.plan.ranks.predict import StepTimes, most_micro_batches

WARM_UP = 3  # number of first steps whose times are ignored, in jobs of more than 3 * WARM_UP steps


@dataclass
class MeasuredRun:
    """The records of one run."""

    path: Path
    config: dict[str, Any]  # {section.key: value}
    lanes: Lanes  # lanes (fixed sequences of micro-batches) of a global batch
    steps: int = 0  # number of the last step
    tokens: int = 0  # tokens trained on
    train_loss: float | None = None  # train_loss at the last step
    evaluations: list[tuple[int, float]] = field(default_factory=list)  # (step, val_loss)
    noises: list[tuple[int, Noise]] = field(default_factory=list)  # (step, gradient noise of this step)
    starts: list[tuple[int | None, list[dict[str, Any]]]] = field(default_factory=list)  # (ranks, lines of steps) of each job


def read(run: Path) -> MeasuredRun:
    """Return the records of the run in the folder `run`. Raises UsageError if the folder is not a run with at least one step.
    Independent."""
    if not (run / "metrics.jsonl").is_file() or not (run / "config.toml").is_file():
        raise UsageError(f"{run}: no metrics.jsonl or no config.toml in this folder. Give the folder of a run (its run.dir)")
    config = read_run_config(run / "config.toml")
    try:
        cut = [int(config[f"train.{name}"]) for name in ("global_batch", "micro_batch", "lanes")]
        found = MeasuredRun(run, config, Lanes(*cut))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{run / 'config.toml'}: invalid global_batch, micro_batch or lanes ({error!r})") from error
    for line in read_lines(run / "metrics.jsonl"):
        _add(found, line)
    if not found.steps or not found.tokens:
        raise UsageError(f"{run / 'metrics.jsonl'} has no line of a step. Train first")
    return found


def _add(run: MeasuredRun, line: dict[str, Any]) -> None:
    if line.get("event") == "start":
        ranks = number(line, "ranks")
        run.starts.append((int(ranks) if ranks and ranks >= 1 else None, []))
    elif "event" in line:
        return
    elif (loss := number(line, "val_loss")) is not None:
        run.evaluations.append((line["step"], loss))
    elif (tokens := number(line, "tokens")) is not None:
        run.steps, run.tokens, run.train_loss = line["step"], int(tokens), number(line, "train_loss")
        if not run.starts:
            run.starts.append((None, []))
        run.starts[-1][1].append(line)
        signal_square, trace = number(line, "noise_signal_square"), number(line, "noise_trace")
        if signal_square is not None and trace is not None:
            run.noises.append((run.steps, Noise(signal_square, trace)))


def steps_to(run: MeasuredRun, loss: float | None) -> tuple[float, float | None, str]:
    """Return (steps, loss, name of the loss) of the goal. If `loss` is None, the goal is the last evaluation, or the last step if
    there is no evaluation. Otherwise the goal is the step at which val_loss reached `loss`, interpolated linearly between
    evaluations. Raises UsageError if the run did not reach `loss`. Pure."""
    if loss is None:
        if run.evaluations:
            return *run.evaluations[-1], "val_loss"
        return run.steps, run.train_loss, "train_loss"
    before: tuple[int, float] | None = None
    for step, found in run.evaluations:
        if found <= loss:
            if before is None:
                return step, loss, "val_loss"
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - found), loss, "val_loss"
        before = step, found
    losses = [found for _, found in run.evaluations]
    best = f"Its lowest val_loss is {min(losses):.4f}. Lower losses cannot be predicted" if losses else "It was never evaluated"
    raise UsageError(f"--loss={loss:g}: {run.path} did not reach this val_loss. {best}")


def seconds(runs: Sequence[MeasuredRun]) -> list[StepTimes]:
    """Return the median step times for each number of ranks in `runs`. If a run did not record its number of ranks, 1 is assumed.
    Raises UsageError if no step has a compute time. Pure."""
    found: dict[int, list[tuple[float, float, float]]] = {}
    for run in runs:
        for recorded, lines in run.starts:
            ranks = recorded or 1
            most = most_micro_batches(run.lanes, ranks)
            rank_0 = sum(len(run.lanes.micro_batches(lane)) for lane in run.lanes.of_rank(0, ranks))
            for line in _timed(lines):
                compute, own = number(line, "compute_seconds"), number(line, "grad_accum") or rank_0
                if compute is None or not own:
                    continue
                each = (compute + (number(line, "data_seconds") or 0.0)) / own
                uneven = (most - own) * each  # the part of comm_wait in which rank 0 waits for ranks with more micro-batches
                comm = (number(line, "comm_wait_seconds") or 0.0) - max(0.0, uneven)
                found.setdefault(ranks, []).append((each, max(0.0, comm), number(line, "update_seconds") or 0.0))
    if not found:
        raise UsageError(f"{runs[0].path / 'metrics.jsonl'}: no line has compute_seconds, so no step can be timed")
    return [StepTimes(p, *(statistics.median(values) for values in zip(*found[p], strict=True))) for p in sorted(found)]


def step_seconds(run: MeasuredRun) -> float | None:
    """Return the median time in seconds of the steps since the last start of the run. Return None if step times were not
    recorded. Pure."""
    found = [one for line in _timed(run.starts[-1][1]) if (one := number(line, "step_seconds"))]
    return statistics.median(found) if found else None


def _timed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return lines[WARM_UP:] if len(lines) > 3 * WARM_UP else lines

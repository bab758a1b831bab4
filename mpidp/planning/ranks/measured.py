"""What RUN/config.toml and RUN/metrics.jsonl say of a run: what it learned by when, its gradient noise, its seconds.

Needs neither MPI nor torch, and changes nothing in RUN. Lines and fields that are missing, or are cut off by a job that still
writes, are left out.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpidp.config.command_line import read_toml
from mpidp.data.lanes import Lanes
from mpidp.errors import UsageError
from mpidp.metrics.gradient_noise import Noise
from mpidp.metrics.jsonl import number
from mpidp.planning.ranks.predict import Seconds, most_micro_batches

WARM_UP = 3  # steps after a start that are not timed, where there are more than three times as many


@dataclass
class Facts:
    """One run."""

    path: Path
    config: dict[str, Any]  # {section.key: value}
    lanes: Lanes
    steps: int = 0  # the last one's number
    tokens: int = 0  # learned from until then
    train_loss: float | None = None  # the last
    evaluations: list[tuple[int, float]] = field(default_factory=list)  # (step, val_loss)
    noises: list[tuple[int, Noise]] = field(default_factory=list)  # (step, measured in that step alone)
    starts: list[tuple[int | None, list[dict[str, Any]]]] = field(default_factory=list)  # (ranks, lines of steps) of each job


def read(run: Path) -> Facts:
    """UsageError where RUN is not a run that has made a step. Independent."""
    if not (run / "metrics.jsonl").is_file() or not (run / "config.toml").is_file():
        raise UsageError(f"{run}: no metrics.jsonl and config.toml there; give the folder of a run (its run.dir)")
    config = read_toml(run / "config.toml")
    try:
        cut = [int(config[f"train.{name}"]) for name in ("global_batch", "micro_batch", "lanes")]
        facts = Facts(run, config, Lanes(*cut))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{run / 'config.toml'}: global_batch, micro_batch and lanes are not a run's ({error!r})") from error
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UsageError(f"{run / 'metrics.jsonl'} cannot be read ({error})") from error
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and number(line, "step") is not None:
            _take(facts, line)
    if not facts.steps or not facts.tokens:
        raise UsageError(f"{run / 'metrics.jsonl'} has no line of a step: train first")
    return facts


def _take(facts: Facts, line: dict[str, Any]) -> None:
    if line.get("event") == "start":
        ranks = number(line, "ranks")
        facts.starts.append((int(ranks) if ranks and ranks >= 1 else None, []))
    elif "event" in line:
        return
    elif (loss := number(line, "val_loss")) is not None:
        facts.evaluations.append((int(line["step"]), loss))
    elif (tokens := number(line, "tokens")) is not None:
        facts.steps, facts.tokens, facts.train_loss = int(line["step"]), int(tokens), number(line, "train_loss")
        if not facts.starts:
            facts.starts.append((None, []))
        facts.starts[-1][1].append(line)
        signal_square, trace = number(line, "noise_signal_square"), number(line, "noise_trace")
        if signal_square is not None and trace is not None:
            facts.noises.append((facts.steps, Noise(signal_square, trace)))


def steps_to(facts: Facts, loss: float | None) -> tuple[float, float | None, str]:
    """(steps, loss, its name) of the goal: the run's end, or the first evaluation at or below `loss`, on the straight line from
    the one before. UsageError when the run did not come so far. Pure."""
    if loss is None:
        if facts.evaluations:
            return *facts.evaluations[-1], "val_loss"
        return facts.steps, facts.train_loss, "train_loss"
    before: tuple[int, float] | None = None
    for step, found in facts.evaluations:
        if found <= loss:
            if before is None:
                return step, loss, "val_loss"
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - found), loss, "val_loss"
        before = step, found
    losses = [found for _, found in facts.evaluations]
    best = f"its best is {min(losses):.4f}, and nothing is predicted beyond that" if losses else "it was never evaluated"
    raise UsageError(f"--loss={loss:g}: {facts.path} did not reach this val_loss: {best}")


def seconds(runs: Sequence[Facts]) -> list[Seconds]:
    """Medians over steps for each number of ranks in these runs; 1 where a run does not say. UsageError without any. Pure."""
    found: dict[int, list[tuple[float, float, float]]] = {}
    for facts in runs:
        for said, lines in facts.starts:
            ranks = said or 1
            most = most_micro_batches(facts.lanes, ranks)
            rank_0 = sum(len(facts.lanes.micro_batches(lane)) for lane in facts.lanes.of_rank(0, ranks))
            for line in _timed(lines):
                compute, mine = number(line, "compute_seconds"), number(line, "grad_accum") or rank_0
                if compute is None or not mine:
                    continue
                each = (compute + (number(line, "data_seconds") or 0.0)) / mine
                uneven = (most - mine) * each  # rank 0 waits that long for ranks with more lanes, inside comm_wait
                comm = (number(line, "comm_wait_seconds") or 0.0) - max(0.0, uneven)
                found.setdefault(ranks, []).append((each, max(0.0, comm), number(line, "update_seconds") or 0.0))
    if not found:
        raise UsageError(f"{runs[0].path / 'metrics.jsonl'}: no line has compute_seconds, so no step can be timed")
    return [Seconds(p, *(statistics.median(values) for values in zip(*found[p], strict=True))) for p in sorted(found)]


def step_seconds(facts: Facts) -> float | None:
    """Median of whole steps since the last start; None where lines do not say. Pure."""
    found = [one for line in _timed(facts.starts[-1][1]) if (one := number(line, "step_seconds"))]
    return statistics.median(found) if found else None


def _timed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return lines[WARM_UP:] if len(lines) > 3 * WARM_UP else lines

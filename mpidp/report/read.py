"""Reads config.toml and metrics.jsonl in a run's folder for mpidp.report. Facts that the run's `start` lines lack are read from
its newest checkpoint. This module needs neither MPI nor torch, and changes no file in RUN."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict

from mpidp.config.command_line import read_run_config
from mpidp.errors import UsageError
from mpidp.metrics.jsonl import number, read_lines, took
from mpidp.runtime.json_file import read_json

ALIVE_SECONDS = 10.0  # if a lock is older, no job is running: a job writes to its lock every second


class _Facts(TypedDict):
    fingerprint: dict[str, Any]
    data: str


class _Sealed(TypedDict):
    """The entries of a manifest that this module reads."""

    body: _Facts


@dataclass
class RecordedRun:
    """The records of one run. Its lines are those of metrics.jsonl, in the order of the file."""

    path: Path
    name: str
    config: dict[str, Any]  # {section.key: value}
    lines: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)  # the last `start` line
    going: bool = False  # whether a job is writing to the run now

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The `start` lines. Each job writes one. A job that goes back to an earlier step may drop the `start` lines of previous
        jobs."""
        return [line for line in self.lines if line.get("event") == "start"]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of steps that updated the model."""
        return [line for line in self.lines if "event" not in line and number(line, "train_loss") is not None]

    @property
    def meetings(self) -> list[dict[str, Any]]:
        """The lines of meetings, which are the steps at which all ranks synchronize. The line of any other step describes only
        rank 0, and its number of tokens is that of the last meeting. Such a line is left out."""
        tokens = [0.0, *(number(line, "tokens") or 0.0 for line in self.steps)]
        return [line for line, before, now in zip(self.steps, tokens, tokens[1:], strict=False) if now > before]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations with a val_loss."""
        return [line for line in self.lines if "event" not in line and number(line, "val_loss") is not None]

    @property
    def end(self) -> dict[str, Any] | None:
        """The `end` line, or None if the run has not finished."""
        return next((line for line in reversed(self.lines) if line.get("event") == "end"), None)

    @property
    def ranks(self) -> int:
        """The number of ranks in the last `start` line, or 1 if the line does not state it."""
        return int(number(self.starts[-1], "ranks") or 1) if self.starts else 1

    @property
    def tokens(self) -> int:
        """The number of tokens on which the run has trained."""
        return int(number(self.steps[-1], "tokens") or 0)

    def total(self, name: str) -> float:
        """Return the sum of the field `name` over all lines. Pure."""
        return sum(number(line, name) or 0.0 for line in self.lines)

    def worked(self) -> list[tuple[dict[str, Any], float]]:
        """Return (line, seconds) for each line. The seconds are the time that all jobs had run until the line was written,
        including the time of lost steps. Return [] if the lines have no times. Pure."""
        if not any("unix_seconds" in line for line in self.lines):
            return []
        each = (a + (number(line, "lost_seconds") or 0.0) for a, line in zip(took(self.lines), self.lines, strict=True))
        return list(zip(self.lines, accumulate(each), strict=True))

    def seconds(self) -> float:
        """Return the total time of all jobs in seconds. If the lines have no times, return the total time of the steps. Pure."""
        return self.worked()[-1][1] if self.worked() else self.total("step_seconds")

    def starting(self) -> float:
        """Return the seconds that jobs spent starting, or restarting after failures. seconds() includes this time. Pure."""
        return sum(gap for gap, line in zip(took(self.lines), self.lines, strict=True) if line.get("event") == "start")


def read(path: Path) -> RecordedRun:
    """Return the records of the run in the folder `path`. Raises UsageError if the folder is not a run with at least one step.
    Independent."""
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder. Give the folder of a run (its run.dir)")
    for name in ("config.toml", "metrics.jsonl"):
        if not (path / name).is_file():
            hint = "the run has not started, or failed before its first step" if name == "metrics.jsonl" else "not a run"
            raise UsageError(f"{path} has no {name} ({hint}). Give the folder of a run (its run.dir)")
    config = read_run_config(path / "config.toml")
    run = RecordedRun(path, path.name or str(path), config, read_lines(path / "metrics.jsonl"))
    if not run.steps:
        raise UsageError(f"{path / 'metrics.jsonl'} has no line of a step: the run has not completed a step yet")
    run.facts = _checkpoint_facts(path) | (run.starts[-1] if run.starts else {})
    with suppress(OSError):
        run.going = run.end is None and abs(time.time() - (path / "lock").stat().st_mtime) < ALIVE_SECONDS
    return run


def _checkpoint_facts(path: Path) -> dict[str, Any]:
    """Return the fingerprint and the data from the newest checkpoint, or {} if the checkpoint cannot be read."""
    with suppress(OSError, ValueError):
        for folder in sorted((path / "checkpoints").glob("step_*"))[-1:]:
            body = read_json(folder / "manifest.json", _Sealed)["body"]
            return {"fingerprint": body["fingerprint"], "data": {"index_sha256": body["data"]}}
    return {}

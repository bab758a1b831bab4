"""What a run's folder says of it, for mpidp.report: config.toml, metrics.jsonl, and the newest checkpoint's words for runs of
before the `start` line told of hosts and versions. Needs neither MPI nor torch, and changes nothing in RUN."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from mpidp.config.command_line import read_toml
from mpidp.errors import UsageError
from mpidp.metrics.jsonl import number, parsed, took

ALIVE_SECONDS = 10.0  # a job counts in its lock each second


@dataclass
class Run:
    """One run; lines in the order of the file."""

    path: Path
    name: str
    config: dict[str, Any]  # {section.key: value}
    lines: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)  # of the last start
    going: bool = False  # a job writes there now

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The `start` line of each job, or part of one, whose steps count."""
        return [line for line in self.lines if line.get("event") == "start"]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of updates."""
        return [line for line in self.lines if "event" not in line and number(line, "train_loss") is not None]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "event" not in line and number(line, "val_loss") is not None]

    @property
    def end(self) -> dict[str, Any] | None:
        """The record of the end, when the run has come to it."""
        return next((line for line in reversed(self.lines) if line.get("event") == "end"), None)

    @property
    def ranks(self) -> int:
        """Of the last start; 1 where it does not say."""
        return int(number(self.starts[-1], "ranks") or 1) if self.starts else 1

    @property
    def tokens(self) -> int:
        """Learned from."""
        return int(number(self.steps[-1], "tokens") or 0)

    def total(self, name: str) -> float:
        """Of a figure over all lines."""
        return sum(number(line, name) or 0.0 for line in self.lines)

    def worked(self) -> list[tuple[dict[str, Any], float]]:
        """(line, seconds of all jobs on this run until then), with what was lost; nothing where lines have no time."""
        if not any("unix_seconds" in line for line in self.lines):
            return []
        each = (a + (number(line, "lost_seconds") or 0.0) for a, line in zip(took(self.lines), self.lines, strict=True))
        return list(zip(self.lines, accumulate(each), strict=True))

    def seconds(self) -> float:
        """Of all jobs that worked on this run; of its steps, where no more is known."""
        return self.worked()[-1][1] if self.worked() else self.total("step_seconds")

    def starting(self) -> float:
        """Of these, until they began to train, or went on after a failure."""
        return sum(gap for gap, line in zip(took(self.lines), self.lines, strict=True) if line.get("event") == "start")


def read(path: Path) -> Run:
    """UsageError where it is not a run that has made a step. Independent."""
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such folder; give the folder of a run (its run.dir)")
    for name in ("config.toml", "metrics.jsonl"):
        if not (path / name).is_file():
            hint = "it was not started, or died before its first step" if name == "metrics.jsonl" else "it is not a run"
            raise UsageError(f"{path}: no {name} there ({hint}); give the folder of a run (its run.dir)")
    config = read_toml(path / "config.toml")
    try:
        lines = list(parsed((path / "metrics.jsonl").read_bytes().splitlines()))
    except OSError as error:
        raise UsageError(f"{path / 'metrics.jsonl'} cannot be read ({error})") from error
    run = Run(path, path.name or str(path), config, [line for line in lines if number(line, "step") is not None])
    if not run.steps:
        raise UsageError(f"{path / 'metrics.jsonl'}: no line of a step: the run has not made one (yet): train first")
    run.facts = _checkpoint_facts(path) | (run.starts[-1] if run.starts else {})
    with suppress(OSError):
        run.going = run.end is None and time.time() - (path / "lock").stat().st_mtime < ALIVE_SECONDS
    return run


def _checkpoint_facts(path: Path) -> dict[str, Any]:
    """What the newest checkpoint tells of the run, where there is one that can be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        newest = sorted((path / "checkpoints").glob("step_*"))[-1:]
        for folder in newest:
            meta = json.loads((folder / "manifest.json").read_text())["meta"]
            return {"fingerprint": meta["fingerprint"], "data": {"index_sha256": meta["data"]}}
    return {}

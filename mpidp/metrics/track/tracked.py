"""The interface of trackers. A tracker first gets the facts of a run, and then batches of lines of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

LEFT_OUT = ("step", "unix_seconds")
TEXTS = ("event", "reason", "weights_sha256", "why")  # fields with text that a tracker may show


@dataclass(frozen=True)
class TrackedRun:
    """The facts of a run."""

    folder: str  # RUN/track, for the files of the trackers
    name: str  # the name of the folder RUN
    project: str
    tags: Sequence[str]
    step: int  # the step from which this job continues; an earlier job may have written later steps
    config: Mapping[str, Any]  # all settings, as section.key: value
    state: dict[str, Any] = field(default_factory=dict)  # stored in RUN/track/TRACKER.json; `id` is the same in all jobs of a run

    @property
    def run_dir(self) -> Path:
        return Path(self.folder).parent


class Tracker(Protocol):
    """Writes the metrics of one run to a tracker. If a method raises an exception, a warning is printed, and training
    continues."""

    note: str  # a warning from opening the run, or ""
    purges: bool  # whether values that are written again for a step replace the first ones; if not, each step is written once

    def __init__(self, run: TrackedRun) -> None:
        """Open the run. If an earlier job has opened it, continue it."""

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Store the numbers in these lines. After an exception, the same lines are passed again, together with later lines."""

    def close(self, ended: bool) -> None:
        """Store what is left, and close the run. ended: whether the run is complete. If False, the run may be resumed."""


def compact(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a line of metrics.jsonl that trackers use: numbers and some short texts. For a `start` line, fields
    inside an object are also returned, with the names OBJECT.FIELD. Pure."""
    found = {key: value for key, value in line.items() if key in TEXTS or _is_number(value)}
    if line.get("event") == "start":
        for key, value in line.items():
            if isinstance(value, dict):
                found |= {f"{key}.{name}": one for name, one in value.items() if isinstance(one, (str, int, float))}
    return found


def scalars_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Return {name: number} for a line. The names are val/KEY for the line of an evaluation, and steps/KEY for the line of a
    step. For the line of an event, return {}. Pure."""
    if "event" in line:
        return {}
    return {f"{kind_of(line)}/{key}": value for key, value in line.items() if key not in LEFT_OUT and _is_number(value)}


def kind_of(line: Mapping[str, Any]) -> str:
    """Return the kind of a line: steps, val or events. Pure."""
    return "events" if "event" in line else "val" if "val_loss" in line or "val_tokens" in line else "steps"


def facts_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts in a `start` line (versions, hosts, ranks) or in an `end` line (reason, val_loss, hash of the weights).
    For other lines, return {}. Pure."""
    return {k: v for k, v in line.items() if k not in (*LEFT_OUT, "event")} if line.get("event") in ("start", "end") else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""Reads what a replay needs from the files of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpidp.checkpoint.manifest import committed, step_of
from mpidp.errors import UsageError
from mpidp.metrics.jsonl import read_lines
from mpidp.runtime.world import raise_together
from mpidp.training.lr_schedule import Schedule, schedule_of

FIGURES = ("train_loss", "grad_norm", "lr")  # the keys of metrics.jsonl that are compared


@dataclass(frozen=True)
class Record:
    """What a replay needs from the files of a run."""

    path: Path
    lines: dict[int, dict[str, Any]]  # lines of metrics.jsonl, by step
    skipped: list[int]  # numbers of the batches that made no update
    passed: dict[int, int]  # step to which the run returned -> last batch that it then skipped
    checkpoints: dict[int, Path]  # folders of checkpoints, by step
    last: int  # last step that can be replayed, even if its update was skipped
    ranks: dict[int, int] = field(default_factory=dict)  # step after which the number of ranks was set -> number of ranks

    schedules: dict[int, Schedule] = field(default_factory=dict)  # step after which a job started -> its schedule

    def schedule_of(self, step: int) -> Schedule | None:
        """Return the learning-rate schedule with which the run computed step `step`, or None if it was not recorded. Pure."""
        return self.schedules.get(max((at for at in self.schedules if at < step), default=-1))

    def ranks_in(self, start: int, last: int) -> set[int]:
        """Return the numbers of ranks with which the run computed steps start + 1 to last, or an empty set if unknown. Pure."""
        begun = max((at for at in self.ranks if at <= start), default=0)
        return {ranks for at, ranks in self.ranks.items() if at == begun or start < at < last}


def read_record(run: str, world: Any) -> Record:
    """Return the record of a run. `run`: the folder of the run. Rank 0 reads the record, and all ranks return it. Raises
    UsageError if there is no such run. Collective over world."""
    with raise_together(world):
        file = Path(run) / "metrics.jsonl"
        records = read_lines(file)
        lines = {line["step"]: line for line in records if all(key in line for key in FIGURES)}
        skipped = [line["batch"] for line in records if line.get("event") == "skipped" and "batch" in line]
        passed = {line["step"]: line["batch"] for line in records if line.get("event") == "rolled_back" and "batch" in line}
        begun = [line for line in records if line.get("event") in ("start", "recovered", "respawned")]
        ranks = {line["step"]: line["ranks"] for line in begun if isinstance(line.get("ranks"), int)}
        schedules = {line["step"]: schedule_of(line["schedule"]) for line in begun if "schedule" in line}
        saved = {step_of(p): p for p in reversed(committed(file.with_name("checkpoints")))}
        last = max([*lines, *saved], default=0)
        last += max(skipped, default=-1) >= last + lines.get(last, {}).get("skipped", 0)
        if not last:
            raise UsageError(f"{run} is not a run: it has neither a step in metrics.jsonl nor a checkpoint")
    return world.bcast(Record(Path(run), lines, skipped, passed, saved, last, ranks, schedules), root=0)

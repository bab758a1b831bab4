"""From ideal to measured tokens a second: where the time of a run went, in shares that add up to all of it. Pure.

All seconds are those of whole jobs: from the start of the process to the last line, with what was lost since the checkpoint that
a restart went back to, and without the time in which no job worked on the run. Of a step, rank 0's line tells: its phases, and
what each rank computed. The mean of the ranks' computing is split into what it would have taken at the speed of the fastest tenth
of all steps (the ideal) and the rest; the slowest rank's over the mean is what others waited for; what rank 0 waited beyond that
is communication which nothing hid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpidp.metrics.jsonl import number
from mpidp.reporting.read import Run

IDEAL_SHARE = 0.1  # of steps, the fastest: what is ideal takes the longest of these
PARTS = {  # in the order of the waterfall
    "ideal": "computing, every step as fast as the fastest tenth of steps",
    "slowdown": "computing more slowly than that",
    "straggler": "waiting for the rank that computes longest",
    "communication": "exchanging gradients, where nothing hides it",
    "data": "waiting for data",
    "update": "updating parameters",
    "evaluation": "evaluating",
    "checkpoint": "checkpoints, as far as training waited for them",
    "skipped": "batches that made no update",
    "lost": "steps that were lost, and done again after a restart",
    "start": "starting, and going on after failures",
    "other": "the rest: records, audits, and what rank 0 does between phases",
}


@dataclass(frozen=True)
class Waterfall:
    """Seconds by part; their sum is that of the whole run."""

    seconds: dict[str, float]
    tokens: int
    dated: bool  # do lines have times? Else what lies between steps is not known

    @property
    def whole(self) -> float:
        return math.fsum(self.seconds.values())

    @property
    def shares(self) -> dict[str, float]:
        """Of the whole, 1 together."""
        return {part: seconds / self.whole if self.whole else 0.0 for part, seconds in self.seconds.items()}

    def speeds(self) -> dict[str, float]:
        """Tokens a second by part: if this and what stands before it were all that takes time. The first is ideal, the last
        measured."""
        found, so_far = {}, 0.0
        for part, seconds in self.seconds.items():
            so_far += seconds
            found[part] = self.tokens / so_far if so_far else 0.0
        return found

    @property
    def goodput(self) -> float:
        """Seconds of steps that count, of the whole."""
        of_steps = ("ideal", "slowdown", "straggler", "communication", "data", "update")
        return sum(self.seconds[part] for part in of_steps) / self.whole if self.whole else 0.0


def of_step(line: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of one step by part; `compute`: the ranks' mean. They add up to the step's. Pure."""
    data, compute, wait, update, stall, whole = (
        max(0.0, number(line, f"{phase}_seconds") or 0.0) for phase in ("data", "compute", "comm_wait", "update", "stall", "step")
    )
    stall = min(stall, wait)
    wait -= stall
    other = max(0.0, whole - data - compute - wait - stall - update)
    computed, fetched = _ranks(line, "rank_compute_seconds"), _ranks(line, "rank_data_seconds")
    if computed and len(fetched) == len(computed):  # then rank 0's own figures serve for the sum alone
        met, count = data + compute + wait, len(computed)
        longest = max(a + b for a, b in zip(computed, fetched, strict=True))
        scale = min(1.0, met / longest) if longest else 0.0  # clocks are not exact
        compute, data = scale * sum(computed) / count, scale * sum(fetched) / count
        straggler = scale * longest - compute - data
        communication = met - scale * longest
    else:
        straggler = min(wait, max(0.0, number(line, "slowest_cost_seconds") or 0.0))
        communication = wait - straggler
    return {"compute": compute, "straggler": straggler, "communication": communication, "data": data, "update": update,
            "checkpoint": stall, "other": other}


def _ranks(line: Mapping[str, Any], name: str) -> list[float]:
    values = line.get(name)
    if not isinstance(values, Sequence) or not all(isinstance(one, (int, float)) for one in values):
        return []
    return [float(one) for one in values]


def waterfall(run: Run) -> Waterfall:
    """Of a whole run. Pure."""
    steps = [of_step(line) for line in run.steps]
    seconds = dict.fromkeys(PARTS, 0.0)
    computed = sorted(step["compute"] for step in steps)
    ideal = computed[int(IDEAL_SHARE * (len(computed) - 1))]
    for step in steps:
        seconds["ideal"] += min(ideal, step["compute"])
        seconds["slowdown"] += max(0.0, step["compute"] - ideal)
        for part in ("straggler", "communication", "data", "update", "checkpoint", "other"):
            seconds[part] += step[part]
    skipped = [line for line in run.lines if line.get("event") == "skipped"]
    seconds["skipped"] = sum(number(line, "step_seconds") or 0.0 for line in skipped)
    seconds["evaluation"] = run.total("evaluate_seconds")
    seconds["checkpoint"] += run.total("checkpoint_seconds")
    seconds["lost"], seconds["start"] = run.total("lost_seconds"), run.starting()
    seconds["other"] += max(0.0, run.seconds() - math.fsum(seconds.values()))
    return Waterfall(seconds, run.tokens, dated=any("unix_seconds" in line for line in run.lines))

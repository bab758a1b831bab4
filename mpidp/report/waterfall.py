"""Divides the time of a run into parts that add up to the total. The parts explain the difference between ideal and measured
throughput. Pure.

The total is the time of all jobs. The time of a job extends from the start of its process to its last line in metrics.jsonl.
The total includes steps that were lost because a restart went back to a checkpoint. A step's line in metrics.jsonl has the
phases of rank 0, and the compute time of each rank. The mean compute time of the ranks in a step is divided into two parts.
The part `ideal` is at most the largest compute time among the fastest tenth of all steps. The part `slowdown` is the rest. The
time by which the slowest rank exceeds the mean counts as waiting for the slowest rank (`straggler`). Any longer wait of rank 0
counts as communication that was not overlapped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpidp.metrics.jsonl import number
from mpidp.report.read import RecordedRun

IDEAL_SHARE = 0.1  # the ideal is the compute time of the slowest step among this share of fastest steps
PARTS = {  # in the order of the waterfall
    "ideal": "compute, if every step were as fast as the fastest tenth of steps",
    "slowdown": "compute time above the ideal",
    "straggler": "waiting for the slowest rank",
    "communication": "gradient exchange that was not overlapped with compute",
    "data": "waiting for data",
    "update": "parameter updates",
    "evaluation": "evaluation",
    "checkpoint": "waiting for checkpoints",
    "skipped": "batches without an update",
    "lost": "steps that were lost and repeated after a restart",
    "start": "starting, and restarting after failures",
    "other": "the rest: logging, audits, and rank 0's time between phases",
}


@dataclass(frozen=True)
class Waterfall:
    """The seconds of each part of a run's time. The parts add up to the total time."""

    seconds: dict[str, float]
    tokens: int  # number of tokens trained on
    dated: bool  # whether the lines have times; if not, the time between steps is unknown

    @property
    def whole(self) -> float:
        """The total time in seconds."""
        return math.fsum(self.seconds.values())

    @property
    def shares(self) -> dict[str, float]:
        """The share of each part in the total time. The shares add up to 1."""
        return {part: seconds / self.whole if self.whole else 0.0 for part, seconds in self.seconds.items()}

    def speeds(self) -> dict[str, float]:
        """Return {part: tokens per second}. The value is the speed that the run would have if only this part and the parts before
        it took time. The first speed is the ideal speed. The last speed is the measured speed. Pure."""
        found, so_far = {}, 0.0
        for part, seconds in self.seconds.items():
            so_far += seconds
            found[part] = self.tokens / so_far if so_far else 0.0
        return found

    @property
    def goodput(self) -> float:
        """The share of the total time that was spent in steps whose updates were kept."""
        of_steps = ("ideal", "slowdown", "straggler", "communication", "data", "update")
        return sum(self.seconds[part] for part in of_steps) / self.whole if self.whole else 0.0


def of_step(line: Mapping[str, Any]) -> dict[str, float]:
    """Return {phase: seconds} for the line of one step. The phases add up to the time of the step. `compute` and `data` are means
    over the ranks. Pure."""
    data, compute, wait, update, stall, whole = (
        max(0.0, number(line, f"{phase}_seconds") or 0.0) for phase in ("data", "compute", "comm_wait", "update", "stall", "step")
    )
    stall = min(stall, wait)
    wait -= stall
    other = max(0.0, whole - data - compute - wait - stall - update)
    computed, fetched = _ranks(line, "rank_compute_seconds"), _ranks(line, "rank_data_seconds")
    if computed and len(fetched) == len(computed):  # then only the sum of data, compute and wait of rank 0 is used
        total, count = data + compute + wait, len(computed)
        longest = max(a + b for a, b in zip(computed, fetched, strict=True))
        scale = min(1.0, total / longest) if longest else 0.0  # the clocks of ranks differ slightly
        compute, data = scale * sum(computed) / count, scale * sum(fetched) / count
        straggler = scale * longest - compute - data
        communication = total - scale * longest
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


def waterfall(run: RecordedRun) -> Waterfall:
    """Return the time of a whole run, divided into the parts of the waterfall. Pure."""
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

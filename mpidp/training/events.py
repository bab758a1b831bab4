"""Writes lines of the training loop to metrics.jsonl: start, step, skipped batch and end."""

from __future__ import annotations

import time
from typing import Any

from mpidp.metrics.gradient_noise import Noise
from mpidp.runtime.environment import BEGAN
from mpidp.training.job import Job
from mpidp.training.step_report import StepReport

NAMED_RANKS = 64  # if there are more ranks, not every line lists the seconds of each rank


def record_start(job: Job) -> None:
    """Write the `start` line, which contains facts about the run. If the run resumes, the steps that it made after the
    checkpoint are lost. The line then also contains their number and their time. Independent."""
    job.record.write({
        "event": "start", "step": job.position.step, "ranks": job.comm.size, "lanes": job.lanes.num_lanes,
        "micro_batches": job.lanes.num_micro_batches, "setup_seconds": time.time() - BEGAN,
        **job.record.lost(), **job.record.facts,
    })


def spent(job: Job) -> dict[str, Any]:
    """Return the seconds of each phase, and the bytes sent, since the last call, as fields for metrics.jsonl. The field
    comm_wait_seconds includes the strategy's communication, and update_seconds does not. Independent."""
    seconds = job.services.clock.pop_seconds()
    sent_bytes, comm_seconds = job.transport.pop_counts()
    if "step_seconds" in seconds:
        seconds["comm_wait_seconds"] += comm_seconds
        seconds["update_seconds"] -= comm_seconds
    return {**seconds, "comm_bytes": sent_bytes}


def log_step(job: Job, learned: dict[str, Any], report: StepReport, epoch: int) -> None:
    """Write the line of a step. A field that ends in _seconds is this rank's time, or a list with the time of every rank. The
    field slowest_cost_seconds is the mean time that ranks waited for the slowest rank. `learned`: the loss and other fields for
    the line. Independent."""
    at, seconds = job.position, spent(job)
    job.state.step_seconds += seconds["step_seconds"]
    speed = report.tokens / (job.state.step_seconds if report.synchronized else seconds["step_seconds"])
    if report.synchronized:
        job.state.step_seconds = 0.0
    slowest = int(report.seconds.argmax())
    line = {
        "step": at.step, **learned, "tokens": at.tokens, "tokens_per_second": speed, "mfu": job.record.mfu(speed), "epoch": epoch,
        **seconds, "slowest_rank": slowest, "slowest_cost_seconds": float(report.seconds[slowest] - report.seconds.mean()),
        "skipped": at.skipped,
    }
    if report.synchronized and at.step % -(-len(report.seconds) // NAMED_RANKS) == 0:
        line["rank_compute_seconds"] = [round(one / report.steps, 6) for one in report.seconds.tolist()]
        line["rank_data_seconds"] = [round(one / report.steps, 6) for one in report.data_seconds.tolist()]
    if report.synchronized and job.record.facts.get("energy_of"):
        line["energy_joules"] = report.joules
    job.state.lines.clear()
    job.record.write(line)
    job.services.progress.step(line)


def log_skipped(job: Job, batch: int, grad_norm: float) -> None:
    """Write the line of a batch that made no update. Independent."""
    job.record.write({"event": "skipped", "step": job.position.step, "batch": batch, "grad_norm": grad_norm, **spent(job)})


def record_end(job: Job, end: dict[str, Any]) -> None:
    """Write the `end` line. `end`: fields of the line. Further fields are added, such as the seconds since the last step.
    Collective over job.comm."""
    rest = job.services.clock.pop_seconds()
    if job.record.facts.get("energy_of"):
        rest["energy_joules"] = job.comm.allreduce(job.services.meter.pop_joules(now=True))
    job.record.write(end | rest)


def noise(job: Job, measured: Noise | None) -> dict[str, float | None]:
    """Return the fields of the gradient noise for a step's line in metrics.jsonl. Return {} if `measured` is None. `measured`:
    the gradient noise, or None if it is unknown. Independent."""
    if measured is None:
        return {}
    job.position.noise.add(measured)
    return {
        "noise_signal_square": measured.signal_square, "noise_trace": measured.trace,
        "noise_scale_tokens": job.position.noise.noise_scale_tokens,
    }

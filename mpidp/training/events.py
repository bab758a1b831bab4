"""The lines of metrics.jsonl that the loop writes: of a start, of a step, of a batch that made no update, of the end."""

from __future__ import annotations

import time
from typing import Any

from mpidp.metrics.gradient_noise import Noise
from mpidp.metrics.jsonl import MetricsFile
from mpidp.runtime.environment import BEGAN
from mpidp.training.job import Job
from mpidp.training.step_report import Board

NAMED_RANKS = 64  # that a line tells of; where there are more, lines do so in turn


def open_metrics(job: Job) -> None:
    """RUN/metrics.jsonl, and what else rank 0 tells of lines. Independent."""
    if job.comm.rank == 0:
        latest = job.lines if job.went_on else None
        job.metrics = MetricsFile(job.run_dir / "metrics.jsonl", job.position.step, job.position.batch, latest)
        job.metrics.also = job.open_scalars(job.position.step)


def record_start(job: Job) -> None:
    """What runs, and what was lost since the checkpoint it goes on from. Independent."""
    job.record({
        "event": "start", "step": job.position.step, "ranks": job.comm.size, "lanes": job.lanes.num_lanes,
        "micro_batches": job.lanes.num_micro_batches, "setup_seconds": time.time() - BEGAN,
        **(job.metrics.lost if job.metrics is not None else {}), **job.facts,
    })


def spent(job: Job) -> dict[str, Any]:
    """Seconds of phases since the last line that told, and bytes sent. What the strategy spent in communication is not its
    update. Independent."""
    seconds = job.clock.pop_seconds()
    sent_bytes, comm_seconds = job.transport.pop_counts()
    if "step_seconds" in seconds:
        seconds["comm_wait_seconds"] += comm_seconds
        seconds["update_seconds"] -= comm_seconds
    return {**seconds, "comm_bytes": sent_bytes}


def log_step(job: Job, learned: dict[str, Any], board: Board, epoch: int) -> None:
    """The line of a step. Seconds are this rank's, but for what the slowest rank cost: the mean of the others' wait for it, and
    where lists tell of each rank. Independent."""
    at, seconds = job.position, spent(job)
    speed = board.tokens / (board.steps * seconds["step_seconds"])
    slowest = int(board.seconds.argmax())
    line = {
        "step": at.step, **learned, "tokens": at.tokens, "tokens_per_second": speed, "mfu": job.mfu(speed), "epoch": epoch,
        **seconds, "slowest_rank": slowest, "slowest_cost_seconds": float(board.seconds[slowest] - board.seconds.mean()),
        "skipped": at.skipped,
    }
    if board.met and at.step % -(-len(board.seconds) // NAMED_RANKS) == 0:
        line["rank_compute_seconds"] = [round(one / board.steps, 6) for one in board.seconds.tolist()]
        line["rank_data_seconds"] = [round(one / board.steps, 6) for one in board.data_seconds.tolist()]
    if board.met and job.facts.get("energy_of"):
        line["energy_joules"] = board.joules
    job.lines.clear()
    job.record(line)
    job.progress.step(line)


def log_skipped(job: Job, batch: int, grad_norm: float) -> None:
    """A batch that made no update, and what it took. Independent."""
    job.record({"event": "skipped", "step": job.position.step, "batch": batch, "grad_norm": grad_norm, **spent(job)})


def record_end(job: Job, end: dict[str, Any]) -> None:
    """With what was spent since the last step's line. Collective over job.comm."""
    told = job.clock.pop_seconds()
    if job.facts.get("energy_of"):
        told["energy_joules"] = job.comm.allreduce(job.meter.pop_joules(now=True))
    job.record(end | told)


def noise(job: Job, measured: Noise | None) -> dict[str, float | None]:
    """What the step's line says of the gradient noise scale; nothing when it was not measured. Independent."""
    if measured is None:
        return {}
    job.position.noise.add(measured)
    return {
        "noise_signal_square": measured.signal_square, "noise_trace": measured.trace,
        "noise_scale_tokens": job.position.noise.noise_scale_tokens,
    }

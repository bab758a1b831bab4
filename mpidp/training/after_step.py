"""The work after a step: log it, redistribute the micro-batches among ranks, evaluate, write a checkpoint, or stop."""

from __future__ import annotations

import math

import numpy as np

from mpidp.data.loader import Loader
from mpidp.errors import Damaged, MpidpError
from mpidp.faults.stop import StopRequest
from mpidp.strategies.protocol import StepStats
from mpidp.training.checkpoints import report_saves, save, stop_run
from mpidp.training.evaluations import evaluate
from mpidp.training.events import log_skipped, log_step, noise
from mpidp.training.job import Job, ended
from mpidp.training.step_report import StepReport, noise_of


def log_update(job: Job, lr: float, stats: StepStats, report: StepReport, epoch: int) -> None:
    """Write to metrics.jsonl the line of a step that updated the parameters. `epoch`: the epoch of the step's batch.
    Independent."""
    learned = {"train_loss": report.loss, "lr": lr, "grad_norm": stats.grad_norm, **stats.extra}
    log_step(job, learned | noise(job, noise_of(job, report, stats.grad_norm)), report, epoch)


def skip(job: Job, batch: int, grad_norm: float) -> None:
    """Log batch number `batch`, for which no rank updated its parameters. After train.max_skipped skipped batches in a row,
    raise Damaged. Then the run returns to the last checkpoint, and skips all batches up to number `batch`. If the run has no
    checkpoint, or has written none since it last returned to a checkpoint, raise MpidpError instead. All ranks make the same
    decision. Independent."""
    at, progress, train = job.position, job.services.progress, job.config.train
    why = "its gradient is not finite" if grad_norm else "it has no target token"
    if grad_norm and math.isfinite(grad_norm):
        why = f"its gradient norm {grad_norm:.3g} is more than {train.spike:g} times the usual norm (train.spike)"
    log_skipped(job, batch, grad_norm)
    progress.print(f"step {at.step}  batch {batch} skipped: {why}")
    if at.skipped_in_a_row < train.max_skipped:
        return
    what = f"{at.skipped_in_a_row} batches in a row, up to batch {batch}, made no update ({why})"
    if job.saver.step > job.state.skipped_from:
        progress.print(f"{what}: returning to the last checkpoint, to continue with batch {batch + 1}")
        raise Damaged.at_batch(what, batch + 1)
    returned = job.state.skipped_from >= 0
    reason = "The run has no checkpoint to return to"
    if returned:
        reason = "The run already returned to its last checkpoint, and has made no new checkpoint since"
    raise MpidpError.on_every_rank(
        f"{what}. {reason}. Lower optim.lr, lengthen optim.warmup_steps, or check the data of these batches"
        + ". The last checkpoint is kept" * returned
    )


def rebalance(job: Job, report: StepReport, loader: Loader) -> None:
    """Pass the measured times of the last step to job.balance, which distributes the lanes (fixed sequences of micro-batches)
    among the ranks. If the distribution changes, log the change. All ranks make the same decision. Independent."""
    change = job.balance.observe(report.seconds.tolist(), [int(n) for n in report.counts])
    if change:
        loader.expect(job.micro_batches())
        step = job.position.step
        job.record.write({"event": "balance", "step": step, "lanes": [len(lanes) for lanes in job.balance.ranges]})
        job.services.progress.print(f"step {step}  {change}")


def follow_up(job: Job, stop: StopRequest, saving: np.ndarray, must_stop: bool) -> None:
    """Evaluate, write a checkpoint, or stop, if this is due after the step that was just completed. `saving`: see StepReport.
    `must_stop`: whether any rank received a request to stop. Work that was done before a failure is not repeated. This
    function does not evaluate after the final step of the run: fit() evaluates then, when all gradients have been applied.
    Collective over job.comm."""
    at, every, last = job.position, job.config.train.eval_every, job.config.train.steps
    job.services.timeline.write_if_complete(job.comm, at.step)
    if every and at.step % every == 0 and at.step < last and at.evaluated_step != at.step:
        evaluate(job)
    if must_stop and not ended(job):
        raise stop_run(job, stop)
    if at.batch and not ended(job) and job.saver.due(at.step, saving):
        save(job)
    report_saves(job)

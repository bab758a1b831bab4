"""The training loop. It fits on one screen, and no method adds a branch to it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from mpidp.data.loader import Loader
from mpidp.errors import Damaged, MpidpError
from mpidp.faults.stop import StopRequest
from mpidp.metrics.jsonl import past
from mpidp.runtime.environment import launched_with_ulfm
from mpidp.runtime.ulfm import is_failure
from mpidp.training.audits import audit_weights
from mpidp.training.checkpoints import report_saves, save, stop_request, stopped
from mpidp.training.events import log_skipped, log_step, noise, open_metrics, record_end, record_start
from mpidp.training.job import Job
from mpidp.training.step import compute
from mpidp.training.step_report import Board, noise_of, share


def fit(job: Job, loader: Loader, stop: StopRequest) -> dict[str, Any]:
    """Train until the steps are done or a stopping rule holds; returns the end record. Raises Stopped after a checkpoint
    when asked to stop. Collective over job.comm."""
    at = job.position
    if job.went_on:
        audit_weights(job)
        settle(job, stop, np.zeros(4), job.comm.size < job.min_ranks)
    while not (reason := ended(job)):
        with job.clock.timed("step"):
            with job.phase("data"):
                batch = next(loader)
            with job.phase("compute") as spent:
                done = compute(job, batch)
            with job.phase("comm_wait"):
                board = share(job, done, spent(), stop.requested())
            with job.phase("update"):
                lr = job.schedule.lr_at(at.step + 1)
                stats = job.strategy.step(lr, board.divisor, at.norm_limit(job.spike))
        at.count(stats, board.tokens if board.met else 0)
        if stats.skipped:
            skip(job, batch.batch, board.tokens, stats.grad_norm)
        else:
            learned: dict[str, Any] = {"train_loss": board.loss, "lr": lr, "grad_norm": stats.grad_norm, **stats.extra}
            log_step(job, learned | noise(job, noise_of(job, board, stats.grad_norm)), board, batch.epoch)
            audit_weights(job)
        if board.met:
            rebalance(job, board, loader)
            settle(job, stop, board.saving, board.stop)
    job.strategy.finish()
    if at.evaluated_step != at.step:
        evaluate(job)
    end = {
        "event": "end", "step": at.step, "reason": reason, "tokens": at.tokens, "skipped": at.skipped,
        "val_loss": at.val_loss, "weights_sha256": job.parts.sha256(job.engine.model), **job.gpu_memory(),
    }
    save(job, end)
    record_end(job, end)
    return end


def settle(job: Job, stop: StopRequest, saving: np.ndarray, must_stop: bool) -> None:
    """What is due after the step that was made last: an evaluation, the end when that was asked for, a checkpoint. What was done
    of it before others died is not done again. Collective over job.comm."""
    at = job.position
    job.timeline.write_if_complete(job.comm, at.step)
    if job.eval_every and at.step % job.eval_every == 0 and at.evaluated_step != at.step:
        evaluate(job)
    if must_stop and not ended(job):
        raise stopped(job, stop)
    if at.batch and not ended(job) and job.saver.due(at.step, saving):
        save(job)
    report_saves(job)


def run_to_end(job: Job, resumed: bool, events: list[dict[str, Any]]) -> dict[str, Any]:
    """fit, with what must be opened before and closed after. events: what led here, for the record. Collective over job.comm."""
    stop = job.stop = stop_request(job)
    open_metrics(job)
    job.timeline.attach(job, job.comm)
    if job.comm.rank == 0 and job.saver.every < 0:
        job.saver.failures, job.saver.trained = past(job.run_dir / "metrics.jsonl")
    record_start(job)
    if resumed:
        job.record({"event": "resume", "step": job.position.step})
    for event in events:
        job.record(event | {"step": job.position.step})
    loader = job.open_loader(job.position.batch)
    lost = False
    try:
        end = fit(job, loader, stop)
        job.progress.print(f"done: step {end['step']}  val_loss {end['val_loss']}  weights_sha256 {end['weights_sha256']}")
        close(job)
        return end
    except MpidpError as error:
        if error.everywhere:
            close(job)
        raise
    except Exception as error:
        lost = is_failure(error)
        raise
    finally:
        loader.close()
        job.meter.close()
        job.progress.close()
        if job.metrics is not None:
            job.metrics.close()
        if not lost:  # else they serve until those of the next job do
            stop.close()
            job.watchdog.close()


def close(job: Job) -> None:
    """Give shared memory back; the model is gone with it. What is being saved is written first: the run may go on from there.
    Collective over job.comm."""
    job.saver.wait_for_save(enter=partial(job.watchdog.enter, job.position.step))
    report_saves(job)
    if not launched_with_ulfm():  # there no memory is MPI's, and others may die at any moment
        job.balance.close()
        job.strategy.close()
        job.transport.close()
    else:
        job.strategy.release()  # no thread of it goes on


def ended(job: Job) -> str:
    """Why the run is over, or nothing. The same on every rank. Independent."""
    at = job.position
    if at.step >= job.schedule.total_steps:
        return "steps"
    if job.target_loss and at.val_loss is not None and at.val_loss <= job.target_loss:
        return "target_loss"
    return "patience" if job.patience and at.evaluations_since_best >= job.patience else ""


def rebalance(job: Job, board: Board, loader: Loader) -> None:
    """Perhaps share the lanes out anew from here on. The same on every rank. Independent."""
    words = job.balance.observe(board.seconds.tolist(), [int(n) for n in board.counts])
    if words:
        mine = job.balance.ranges[job.mesh.dp.rank]
        loader.expect([v for lane in mine for v in job.lanes.micro_batches(lane)])
        job.record({"event": "balance", "step": job.position.step, "lanes": [len(lanes) for lanes in job.balance.ranges]})
        job.progress.print(f"step {job.position.step}  {words}")


def skip(job: Job, batch: int, tokens: int, grad_norm: float) -> None:
    """Log a batch that made no update. After max_skipped in a row, Damaged: back to the last checkpoint, and past this batch; an
    MpidpError where there is none, or none since that was done before. The same on every rank. Independent."""
    at = job.position
    why = "it has no target token" if tokens == 0 else "its gradient is not finite"
    if tokens and math.isfinite(grad_norm):
        why = f"its gradient norm {grad_norm:.3g} is more than {job.spike:g} times the usual (train.spike)"
    log_skipped(job, batch, grad_norm)
    job.progress.print(f"step {at.step}  batch {batch} skipped: {why}")
    if at.skipped_in_a_row < job.max_skipped:
        return
    words = f"{at.skipped_in_a_row} batches in a row, up to batch {batch}, made no update ({why})"
    if job.saver.step > job.passed_over_at:
        job.progress.print(f"{words}: back to the last checkpoint, to go on with batch {batch + 1}")
        damage = Damaged.on_every_rank(words)
        damage.next_batch = batch + 1
        raise damage
    raise MpidpError.on_every_rank(
        f"{words}, and no checkpoint to go back to was made {'since the last time' if job.passed_over_at >= 0 else 'yet'}: lower "
        "optim.lr, lengthen optim.warmup_steps, or look at the data there; the last checkpoint is kept"
    )


def evaluate(job: Job) -> None:
    """val_loss at this step. Collective over job.comm."""
    if job.validation is None:
        return
    at = job.position
    enter = partial(job.watchdog.enter, at.step)
    with job.phase("evaluate"):
        loss, tokens = job.engine.evaluate(
            job.validation, job.comm, job.seq_len, job.lanes.micro_batch, job.eval_tokens, enter, job.mesh.dp
        )
    at.val_loss = loss
    better = at.best_val_loss is None or loss < at.best_val_loss
    at.evaluations_since_best = 0 if better else at.evaluations_since_best + 1
    at.best_val_loss = loss if better else at.best_val_loss
    at.evaluated_step = at.step
    job.record({"step": at.step, "val_loss": loss, "val_tokens": tokens})
    job.progress.print(f"step {at.step}  val_loss {loss:.4f}  ({tokens:,} tokens)")


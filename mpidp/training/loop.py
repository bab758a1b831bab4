"""The training loop, which is the same for all training methods."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpidp.data.loader import Loader
from mpidp.errors import MpidpError
from mpidp.faults.stop import StopRequest
from mpidp.metrics.jsonl import past
from mpidp.runtime.environment import launched_with_ulfm
from mpidp.runtime.ulfm import is_failure
from mpidp.training.after_step import follow_up, log_update, rebalance, skip
from mpidp.training.audits import audit_weights
from mpidp.training.checkpoints import report_saves, save
from mpidp.training.evaluations import evaluate
from mpidp.training.events import record_end, record_start
from mpidp.training.job import Job, ended, lacks_ranks
from mpidp.training.step import compute
from mpidp.training.step_report import exchange_reports, take_back


def fit(job: Job, loader: Loader, stop: StopRequest) -> dict[str, Any]:
    """Train until all steps are done or a stopping rule holds. Return the content of the `end` line of metrics.jsonl. If a stop
    is requested, write a checkpoint and raise Stopped. Collective over job.comm."""
    at, clock = job.position, job.services.clock
    too_few = lacks_ranks(job)
    if job.state.recovered or too_few:
        audit_weights(job)
        follow_up(job, stop, np.zeros(4), too_few)
    while not (reason := ended(job)):
        with clock.timed("step"):
            with job.phase("data"):
                batch = next(loader)
            with job.phase("compute") as seconds:
                done = compute(job, batch)
            with job.phase("comm_wait"):
                earlier = job.state.unreported
                report = exchange_reports(job, done, seconds(), stop.requested())
            with job.phase("update"):
                lr = job.schedule.lr_at(at.step + 1)
                stats = job.strategy.step(lr, report.divisor, at.norm_limit(job.config.train.spike))
        at.count(stats, report.tokens if report.synchronized else 0)
        if stats.skipped:
            take_back(job, report, earlier, stats.late > 0)
            skip(job, batch.batch, stats)
        else:
            log_update(job, lr, stats, report, batch.epoch)
            audit_weights(job)
        if report.synchronized:
            rebalance(job, report, loader)
            follow_up(job, stop, report.saving, report.stop)
    drained = job.strategy.drain()
    skipped = [stats for stats in drained if stats.skipped]
    for stats in skipped:
        skip(job, at.batch - 1, stats)
    if at.evaluated_step != at.step or len(skipped) < len(drained):
        evaluate(job)
    return end_run(job, reason, len(skipped))


def end_run(job: Job, reason: str, skipped: int) -> dict[str, Any]:
    """Write the last checkpoint and the `end` line. Return the content of this line. `reason`: why the run is over. `skipped`:
    number of batches that were skipped after the last step. Collective over job.comm."""
    at, peak = job.position, job.engine.peak_bytes()
    end = {
        "event": "end", "step": at.step, "reason": reason, "tokens": at.tokens, "skipped": at.skipped + skipped,
        "val_loss": at.val_loss, "weights_sha256": job.parts.sha256(job.engine.model),
        **({} if peak is None else {"gpu_peak_bytes": job.comm.allgather(peak)}),
    }
    save(job, end)
    record_end(job, end)
    return end


def run_to_end(job: Job, stop: StopRequest, events: list[dict[str, Any]]) -> dict[str, Any]:
    """Open the record and the services, call fit(), and close the record and the services. Return the content of the `end` line.
    `events`: lines about earlier failures, which are written after the `start` line. Collective over job.comm."""
    services, at = job.services, job.position
    job.record.open()
    services.timeline.open(job.comm, at.step)
    if job.comm.rank == 0 and job.saver.every < 0:
        job.saver.seen_before(*past(job.run_dir / "metrics.jsonl"))
    record_start(job)
    for event in events:
        job.record.write(event | {"step": at.step})
    loader = job.open_loader(at.batch)
    lost = False
    try:
        end = fit(job, loader, stop)
        services.progress.print(f"done: step {end['step']}  val_loss {end['val_loss']}  weights_sha256 {end['weights_sha256']}")
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
        if lost:  # the next job does not report the saves of this job
            job.saver.close()
            report_saves(job)
        services.close()
        job.record.close()
        if not lost:  # after a failure, the services stay in use until the next job has its own
            stop.close()
            services.watchdog.close()
            job.record.finish()


def close(job: Job) -> None:
    """Wait until the current checkpoint is written, and free the shared memory. Afterwards the model cannot be used. Collective
    over job.comm."""
    job.saver.wait_for_save(enter=job.services.observers.enter)
    report_saves(job)
    if not launched_with_ulfm():
        job.balance.close()
        job.strategy.close()
        job.transport.close()
    else:  # MPI has no memory to free, and other ranks may fail at any moment
        job.strategy.release()

"""Checkpoints in the training loop."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from datetime import datetime
from functools import partial
from typing import Any

import torch

from mpidp.checkpoint import manifest
from mpidp.checkpoint.reader import Reader
from mpidp.errors import MpidpError, Stopped
from mpidp.faults.stop import TAKEN_OVER, StopRequest, job_end, stop_time
from mpidp.runtime.world import raise_together
from mpidp.training.audits import audit_weights
from mpidp.training.job import Job
from mpidp.training.state import Position


def save(job: Job, end: dict[str, Any] | None = None, wait: bool = False) -> None:
    """A checkpoint of this step, written while training goes on; with `end` or `wait` it is on the disk before this returns, else
    MpidpError on every rank. Collective over job.comm."""
    at, wait, enter = job.position, wait or end is not None, partial(job.watchdog.enter, job.position.step)
    if wait:
        with job.clock.timed("checkpoint"):
            job.saver.wait_for_save(enter=enter)
    if job.saver.step != at.step or end is not None:  # else batches skipped since then are skipped again by whoever resumes
        with job.phase("checkpoint"):
            audit_weights(job, now=True)  # what a run goes back to must be right
            entries = job.parts.entries(job.engine.model, job.strategy.state_dict())
            job.saver.begin(at.step, entries, {"position": asdict(at), "end": end, **job.meta}, wait)
            if wait:
                job.saver.wait_for_save(must=True, enter=enter)
    report_saves(job)


def report_saves(job: Job) -> None:
    """What became of checkpoints that were begun. Independent."""
    for event in job.saver.pop_events():
        job.record(event)
        if event["event"] == "saved":
            job.progress.print(f"step {event['step']}  saved {job.run_dir / 'checkpoints' / 'step_'}{event['step']:08d}")


def restore(job: Job, reader: Reader) -> None:
    """Parameters, optimizer and position from a checkpoint of any number of ranks. Collective over job.comm."""
    with raise_together(job.comm), manifest.readable(reader.path), torch.no_grad():
        job.parts.load(reader, job.engine.model)
        job.strategy.load_state_dict(job.parts.strategy_state(reader, job.engine.model, job.strategy.state_dict()))
        job.position = Position(**reader.meta["position"])
    job.saver.step = job.position.step


def stop_request(job: Job) -> StopRequest:
    """What asks this rank to stop; rank 0 looks at more than signals, and says when the job's time is over. Collective over
    job.comm."""
    first, before = job.comm.rank == 0, job.stop
    if not job.went_on:  # else asking for the time would take some
        end = job_end() if first else None
        job.stop_at = job.comm.bcast(stop_time(end, time.time(), job.stop_early_seconds))
        if end is not None and job.stop_at < math.inf:
            words = [f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M:%S}" for moment in (end, job.stop_at)]
            then = "the run writes a checkpoint and stops (exit code 75)"
            job.progress.print(f"the job's time ends at {words[0]}: at {words[1]} {then}")
    stop_file = job.run_dir / "STOP" if first else None
    stop = StopRequest(stop_file, job.stop_at, lambda: job.lock is not None and job.lock.lost)
    if before is not None:
        stop.reason = stop.reason or before.reason
    if job.went_on and job.comm.size < job.min_ranks:
        stop.reason = f"{job.comm.size} ranks are left, and faults.min_ranks is {job.min_ranks}"
    return stop


def stopped(job: Job, stop: StopRequest) -> MpidpError:
    """The word with which every rank leaves, after a checkpoint unless the run is another's now. Collective over job.comm."""
    reasons = [r for r in job.comm.allgather(stop.reason) if r]
    if TAKEN_OVER in reasons:
        return MpidpError.on_every_rank(
            f"{TAKEN_OVER} {job.run_dir}: this one stops at step {job.position.step} and writes nothing more"
        )
    save(job, wait=True)
    return Stopped.on_every_rank(
        f"stopped on request ({', '.join(sorted(set(reasons)))}) at step {job.position.step}, checkpoint written; the same "
        "command goes on from here"
    )

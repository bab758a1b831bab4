"""Checkpoints in the training loop: saves a job, restores it, and stops it after a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from mpidp.checkpoint import manifest
from mpidp.checkpoint.reader import Reader
from mpidp.errors import MpidpError, Stopped
from mpidp.faults.stop import TAKEN_OVER, StopRequest
from mpidp.runtime.world import raise_together
from mpidp.training.audits import audit_weights
from mpidp.training.job import Job
from mpidp.training.state import Position


def save(job: Job, end: dict[str, Any] | None = None, wait: bool = False) -> None:
    """Begin to write a checkpoint of this step. Writing continues during training. `end`: if the run is over, the content of
    the `end` line of metrics.jsonl. With `end` or `wait`, return only when the checkpoint is on the disk. In this case raises
    MpidpError on every rank if the checkpoint cannot be written. Collective over job.comm."""
    at, wait, enter = job.position, wait or end is not None, job.services.observers.enter
    if wait:
        with job.services.clock.timed("checkpoint"):
            job.saver.wait_for_save(enter=enter)
    if job.saver.step != at.step or end is not None:  # else already saved; a resumed run skips the same batches again
        with job.phase("checkpoint"):
            audit_weights(job, now=True)  # a checkpoint must hold correct weights
            entries = job.parts.entries(job.engine.model, job.strategy.state_dict())
            job.saver.begin(at.step, entries, {"position": asdict(at), "end": end, **job.record.meta}, wait)
            if wait:
                job.saver.wait_for_save(must=True, enter=enter)
    report_saves(job)


def report_saves(job: Job) -> None:
    """Log which checkpoints were written since the last call, and which could not be written. Independent."""
    for event in job.saver.pop_events():
        job.record.write(event)
        if event["event"] == "saved":
            path = job.run_dir / "checkpoints" / f"step_{event['step']:08d}"
            job.services.progress.print(f"step {event['step']}  saved {path}")
            if job.services.mirror is not None:
                job.services.mirror.add(path)


def restore(job: Job, reader: Reader) -> None:
    """Load parameters, optimizer state and position from a checkpoint. The checkpoint may be from another number of ranks.
    Collective over job.comm."""
    with raise_together(job.comm), manifest.readable(reader.path), torch.no_grad():
        job.parts.load(reader, job.engine.model)
        job.strategy.load_state_dict(job.parts.strategy_state(reader, job.engine.model, job.strategy.state_dict()))
        job.state.position = Position(**reader.meta["position"])
    job.saver.resumed_at(job.position.step)


def stop_run(job: Job, stop: StopRequest) -> MpidpError:
    """Write a checkpoint, and return the exception that every rank must raise. Write nothing if another copy of the job has taken
    over the run. Collective over job.comm."""
    reasons = [r for r in job.comm.allgather(stop.reason) if r]
    if TAKEN_OVER in reasons:
        return MpidpError.on_every_rank(
            f"{TAKEN_OVER} {job.run_dir}: this copy stops at step {job.position.step} and writes nothing more"
        )
    save(job, wait=True)
    return Stopped.on_every_rank(
        f"stopped on request ({', '.join(sorted(set(reasons)))}) at step {job.position.step}, checkpoint written; the same "
        "command resumes from here"
    )

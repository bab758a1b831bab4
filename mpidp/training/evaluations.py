"""Evaluations during training: the loss on the validation split, and tasks of lm-eval."""

from __future__ import annotations

import math
from typing import Any

from mpidp.data.shards import TokenStream
from mpidp.errors import DataError
from mpidp.training.job import Job, ended


def evaluate(job: Job) -> None:
    """Compute and record val_loss and the figures of train.eval_tasks at this step. If there is no validation split, check
    instead at the end of the run whether the weights are usable. Collective over job.comm."""
    at = job.position
    with job.phase("evaluate"):
        line = evaluate_validation(job, job.plan.validation) if job.plan.validation is not None else {}
        if job.plan.validation is None and ended(job):
            check_last_update(job)
        line |= evaluate_tasks(job)
    at.evaluated(line.get("val_loss"))  # set only now: if a rank fails above, the other ranks evaluate again
    if line:
        job.record.write({"step": at.step, "val_tokens": 0} | line)


def evaluate_validation(job: Job, validation: TokenStream) -> dict[str, Any]:
    """Compute val_loss. Return the fields for the line of the evaluation in metrics.jsonl. Collective over job.comm."""
    loss, tokens = _loss_on(job, validation, job.config.train.eval_tokens)
    job.services.progress.print(f"step {job.position.step}  val_loss {loss:.4f}  ({tokens:,} tokens)")
    if not math.isfinite(loss):
        warn_unusable(job, "validation")
    return {"val_loss": loss, "val_tokens": tokens}


def evaluate_tasks(job: Job) -> dict[str, Any]:
    """Evaluate the tasks of train.eval_tasks. Return the fields for the line of the evaluation in metrics.jsonl. If the tasks
    cannot be evaluated, print a warning. Collective over job.comm."""
    if job.tasks is None:
        return {}
    figures, problem = job.tasks.run()
    step, progress = job.position.step, job.services.progress
    if problem:
        progress.print(f"warning: at step {step}, train.eval_tasks cannot be evaluated: {problem}")
    shown = [f"{name} {value:.4f}" for name, value in figures.items() if value is not None and "_stderr" not in name]
    if shown:
        progress.print(f"step {step}  {', '.join(shown)}")
    return dict(figures)


def check_last_update(job: Job) -> None:
    """Warn if the loss on one batch of training data is not finite. This detects a bad last update, because the loss of a step is
    computed before the update. Collective over job.comm."""
    config = job.config
    try:
        loss, _ = _loss_on(job, job.plan.training, config.train.global_batch * config.model.seq_len)
    except DataError:  # the loss mask excludes all of these tokens; raised on every rank
        return
    if not math.isfinite(loss):
        warn_unusable(job, "training")


def warn_unusable(job: Job, kind: str) -> None:
    """Print that the loss is not finite. `kind`: "validation" or "training". Independent."""
    job.services.progress.print(
        f"warning: at step {job.position.step}, the {kind} loss is not finite, so the weights are unusable (nan, inf or too "
        "large). Checkpoints from this step on cannot be evaluated or sampled. Stop, and continue from an earlier checkpoint "
        "with a lower optim.lr"
    )


def _loss_on(job: Job, stream: TokenStream, tokens: int) -> tuple[float, int]:
    return job.engine.evaluate(stream, job.comm, job.config.model.seq_len, job.lanes.micro_batch, tokens, job.mesh.dp)

"""The training loop. It fits on one screen, and no method adds a branch to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from mpidp import checkpoint
from mpidp.comm.transport import Messages
from mpidp.data.loader import Loader
from mpidp.data.shards import TokenStream
from mpidp.engine import Engine, weights_sha256
from mpidp.errors import MpidpError, Stopped
from mpidp.lanes import Lanes
from mpidp.metrics import Clock, MetricsFile, Progress
from mpidp.optim import Schedule
from mpidp.schedule import accumulate
from mpidp.state import Entry
from mpidp.stopping import StopRequest
from mpidp.strategies.protocol import Strategy
from mpidp.watchdog import Watchdog


@dataclass
class Position:
    """Where a run stands; all of it goes into the checkpoint."""

    step: int = 0  # updates made
    skipped: int = 0  # batches whose gradient was not finite
    skipped_in_a_row: int = 0
    tokens: int = 0  # target tokens learned from
    val_loss: float | None = None
    best_val_loss: float | None = None
    evaluations_since_best: int = 0

    @property
    def batch(self) -> int:
        """The next batch: the loader's whole state."""
        return self.step + self.skipped


@dataclass
class Job:
    """Everything the loop needs, as plain values and parts."""

    comm: MPI.Intracomm
    engine: Engine
    strategy: Strategy
    open_loader: Callable[[int], Loader]  # from a batch number
    lanes: Lanes
    schedule: Schedule
    transport: Messages
    validation: TokenStream | None
    run_dir: Path
    meta: dict[str, Any]  # what checkpoints say of the run: config, fingerprint, data
    seq_len: int
    eval_every: int
    eval_tokens: int
    save_every: int
    keep: int
    target_loss: float
    patience: int
    max_skipped: int
    progress: Progress
    watchdog: Watchdog
    mfu: Callable[[float], float | None]  # of tokens a second
    position: Position = field(default_factory=Position)
    saved_step: int = -1  # the newest checkpoint's
    metrics: MetricsFile | None = None  # on rank 0, while it runs


def fit(job: Job, loader: Loader, stop: StopRequest) -> dict[str, Any]:
    """Train until the steps are done or a stopping rule holds; returns the end record. Raises Stopped after a checkpoint
    when asked to stop. Collective over job.comm."""
    at, clock = job.position, Clock()
    mine = [v for lane in job.lanes.of_rank(job.comm.rank, job.comm.size) for v in job.lanes.micro_batches(lane)]
    while not (reason := ended(job)):
        job.watchdog.beat(f"step {at.step + 1}")
        with clock.timed("step"):
            with clock.timed("data"):
                batch = next(loader)
            with clock.timed("compute"):
                sums = job.engine.run(accumulate(mine), batch.batch, batch.micro_batches, job.strategy).tolist()
            with clock.timed("comm_wait"):
                counted = sum(mb.num_tokens for mb in batch.micro_batches)
                loss, tokens, stopping = share(job, mine, sums, counted, stop.wanted())
            with clock.timed("update"):
                lr = job.schedule.lr_at(at.step + 1)
                stats = job.strategy.step(lr, tokens)
        if stats.skipped:
            skip(job, batch.batch, stats.grad_norm)
        else:
            at.step, at.tokens, at.skipped_in_a_row = at.step + 1, at.tokens + tokens, 0
            log_step(job, {"train_loss": loss, "lr": lr, "grad_norm": stats.grad_norm}, tokens, batch.epoch, clock)
            if job.eval_every and at.step % job.eval_every == 0:
                evaluate(job)
        if (stopping or (job.save_every and at.step % job.save_every == 0)) and not ended(job):
            save(job)
            if stopping:
                raise stopped(job, stop)
    job.strategy.finish()
    if job.eval_every == 0 or at.step % job.eval_every:
        evaluate(job)
    end = {
        "event": "end", "step": at.step, "reason": reason, "tokens": at.tokens, "skipped": at.skipped,
        "val_loss": at.val_loss, "weights_sha256": weights_sha256(job.engine.model),
    }
    save(job, end)
    record(job, end)
    return end


def run_to_end(job: Job, resumed: bool) -> dict[str, Any]:
    """fit, with what must be opened before and closed after. Collective over job.comm."""
    stop = StopRequest(job.run_dir / "STOP" if job.comm.rank == 0 else None)
    if job.comm.rank == 0:
        job.metrics = MetricsFile(job.run_dir / "metrics.jsonl", job.position.step, job.position.batch)
    if resumed:
        record(job, {"event": "resume", "step": job.position.step})
    loader = job.open_loader(job.position.batch)
    try:
        end = fit(job, loader, stop)
        job.progress.say(f"done: step {end['step']}  val_loss {end['val_loss']}  weights_sha256 {end['weights_sha256']}")
        return end
    finally:
        loader.close()
        stop.close()
        job.progress.close()
        job.watchdog.close()
        if job.metrics is not None:
            job.metrics.close()


def ended(job: Job) -> str:
    """Why the run is over, or nothing. The same on every rank. Independent."""
    at = job.position
    if at.step >= job.schedule.total_steps:
        return "steps"
    if job.target_loss and at.val_loss is not None and at.val_loss <= job.target_loss:
        return "target_loss"
    return "patience" if job.patience and at.evaluations_since_best >= job.patience else ""


def share(job: Job, mine: list[int], sums: list[float], tokens: int, stop: bool) -> tuple[float, int, bool]:
    """(mean loss, target tokens, stop wanted by any rank) of the global batch. Loss sums of micro-batches are added in
    their order, so the figure does not depend on the number of ranks. Collective over job.comm."""
    board = np.zeros(job.lanes.num_micro_batches + 2)
    board[mine] = sums
    board[-2:] = tokens, stop
    job.comm.Allreduce(MPI.IN_PLACE, board)
    return sum(board[:-2].tolist()) / max(1.0, board[-2]), int(board[-2]), bool(board[-1])


def record(job: Job, line: dict[str, Any]) -> None:
    """A line of metrics.jsonl. Independent."""
    if job.metrics is not None:
        job.metrics.write(line)


def log_step(job: Job, learned: dict[str, float], tokens: int, epoch: int, clock: Clock) -> None:
    """The line of a step. Seconds are this rank's; what the strategy spent in communication is not its update. Independent."""
    at, seconds = job.position, clock.take()
    sent_bytes, comm_seconds = job.transport.take()
    seconds["comm_wait_seconds"] += comm_seconds
    seconds["update_seconds"] -= comm_seconds
    speed = tokens / seconds["step_seconds"]
    line = {
        "step": at.step, **learned, "tokens": at.tokens, "tokens_per_second": speed, "mfu": job.mfu(speed), "epoch": epoch,
        **seconds, "comm_bytes": sent_bytes, "skipped": at.skipped,
    }
    record(job, line)
    job.progress.step(line)


def skip(job: Job, batch: int, grad_norm: float) -> None:
    """Count and log a batch that made no update; MpidpError after max_skipped in a row. The same on every rank. Independent."""
    at = job.position
    at.skipped, at.skipped_in_a_row = at.skipped + 1, at.skipped_in_a_row + 1
    record(job, {"event": "skipped", "step": at.step, "batch": batch, "grad_norm": grad_norm})
    job.progress.say(f"step {at.step}  batch {batch} skipped: no target token, or a gradient that is not finite")
    if at.skipped_in_a_row >= job.max_skipped:
        raise MpidpError.on_every_rank(
            f"{at.skipped_in_a_row} batches in a row, up to batch {batch}, had gradients that are not finite: "
            "lower optim.lr, lengthen optim.warmup_steps, or look at the data there; the last checkpoint is kept"
        )


def evaluate(job: Job) -> None:
    """val_loss at this step. Collective over job.comm."""
    if job.validation is None:
        return
    at = job.position
    job.watchdog.beat(f"evaluation at step {at.step}")
    loss, tokens = job.engine.evaluate(job.validation, job.comm, job.seq_len, job.lanes.micro_batch, job.eval_tokens)
    at.val_loss = loss
    better = at.best_val_loss is None or loss < at.best_val_loss
    at.evaluations_since_best = 0 if better else at.evaluations_since_best + 1
    at.best_val_loss = loss if better else at.best_val_loss
    record(job, {"step": at.step, "val_loss": loss, "val_tokens": tokens})
    job.progress.say(f"step {at.step}  val_loss {loss:.4f}  ({tokens:,} tokens)")


def save(job: Job, end: dict[str, Any] | None = None) -> None:
    """A checkpoint at this step. Collective over job.comm."""
    at = job.position
    if job.saved_step == at.step and end is None:
        return  # batches skipped since then are skipped again by whoever resumes
    job.watchdog.beat(f"checkpoint at step {at.step}")
    entries = {f"model/{name}": Entry(p) for name, p in job.engine.model.named_parameters()}
    entries |= {f"strategy/{name}": entry for name, entry in job.strategy.state_dict().items()}
    meta = {"position": asdict(at), "end": end, **job.meta}
    path = checkpoint.save(job.run_dir, at.step, entries, meta, job.comm, job.keep)
    job.saved_step = at.step
    job.progress.say(f"step {at.step}  saved {path}")


def restore(job: Job, reader: checkpoint.Reader) -> None:
    """Parameters, optimizer and position from a checkpoint of any number of ranks. Collective over job.comm."""
    with torch.no_grad():
        for name, p in job.engine.model.named_parameters():
            p.copy_(reader[f"model/{name}"])
    job.strategy.load_state_dict(reader.under("strategy/"))
    job.position = Position(**reader.meta["position"])
    job.saved_step = job.position.step


def stopped(job: Job, stop: StopRequest) -> Stopped:
    """The word with which every rank leaves. Collective over job.comm."""
    reasons = [r for r in job.comm.allgather(stop.reason) if r]
    return Stopped.on_every_rank(
        f"stopped on request ({', '.join(sorted(set(reasons)))}) at step {job.position.step}, checkpoint written; the same "
        "command goes on from here"
    )


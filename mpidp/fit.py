"""The training loop. It fits on one screen, and no method adds a branch to it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from mpidp import checkpoint
from mpidp.data.loader import Loader
from mpidp.engine import weights_sha256
from mpidp.errors import Damaged, MpidpError, Stopped
from mpidp.job import Job, Position
from mpidp.metrics import Clock, MetricsFile
from mpidp.noise import Noise
from mpidp.state import Entry
from mpidp.step import Board, compute, noise_of, say_finding, share
from mpidp.stopping import StopRequest


def fit(job: Job, loader: Loader, stop: StopRequest) -> dict[str, Any]:
    """Train until the steps are done or a stopping rule holds; returns the end record. Raises Stopped after a checkpoint
    when asked to stop. Collective over job.comm."""
    at, clock = job.position, Clock()
    while not (reason := ended(job)):
        job.watchdog.beat(f"step {at.step + 1}")
        with clock.timed("step"):
            with clock.timed("data"):
                batch = next(loader)
            with clock.timed("compute") as spent:
                done = compute(job, batch)
            with clock.timed("comm_wait"):
                board = share(job, done, spent(), stop.wanted())
            with clock.timed("update"):
                lr = job.schedule.lr_at(at.step + 1)
                stats = job.strategy.step(lr, board.tokens)
        if stats.skipped:
            skip(job, batch.batch, stats.grad_norm)
        else:
            at.step, at.tokens, at.skipped_in_a_row = at.step + 1, at.tokens + board.tokens, 0
            audit_weights(job)
            learned: dict[str, float | None] = {"train_loss": board.loss, "lr": lr, "grad_norm": stats.grad_norm}
            log_step(job, learned | noise(job, noise_of(job, board, stats.grad_norm)), board, batch.epoch, clock)
            if job.eval_every and at.step % job.eval_every == 0:
                evaluate(job)
        rebalance(job, board, loader)
        if (board.stop or (job.save_every and at.step % job.save_every == 0)) and not ended(job):
            save(job)
            if board.stop:
                raise stopped(job, stop)
    job.strategy.finish()
    if job.eval_every == 0 or at.step % job.eval_every:
        evaluate(job)
    end = {
        "event": "end", "step": at.step, "reason": reason, "tokens": at.tokens, "skipped": at.skipped,
        "val_loss": at.val_loss, "weights_sha256": weights_sha256(job.engine.model),
    }
    save(job, end)
    job.record(end)
    return end


def run_to_end(job: Job, resumed: bool, events: list[dict[str, Any]]) -> dict[str, Any]:
    """fit, with what must be opened before and closed after. events: what led here, for the record. Collective over job.comm."""
    stop = StopRequest(job.run_dir / "STOP" if job.comm.rank == 0 else None)
    if job.comm.rank == 0:
        job.metrics = MetricsFile(job.run_dir / "metrics.jsonl", job.position.step, job.position.batch)
    job.record({"event": "start", "step": job.position.step, "ranks": job.comm.size, "lanes": job.lanes.num_lanes,
                "micro_batches": job.lanes.num_micro_batches})
    if resumed:
        job.record({"event": "resume", "step": job.position.step})
    for event in events:
        job.record(event | {"step": job.position.step})
    loader = job.open_loader(job.position.batch)
    try:
        end = fit(job, loader, stop)
        job.progress.say(f"done: step {end['step']}  val_loss {end['val_loss']}  weights_sha256 {end['weights_sha256']}")
        close(job)
        return end
    except MpidpError as error:
        if error.everywhere:
            close(job)
        raise
    finally:
        loader.close()
        stop.close()
        job.progress.close()
        job.watchdog.close()
        if job.metrics is not None:
            job.metrics.close()


def close(job: Job) -> None:
    """Give shared memory back; the model is gone with it. Collective over job.comm."""
    job.balance.close()
    job.strategy.close()


def ended(job: Job) -> str:
    """Why the run is over, or nothing. The same on every rank. Independent."""
    at = job.position
    if at.step >= job.schedule.total_steps:
        return "steps"
    if job.target_loss and at.val_loss is not None and at.val_loss <= job.target_loss:
        return "target_loss"
    return "patience" if job.patience and at.evaluations_since_best >= job.patience else ""


def log_step(job: Job, learned: dict[str, float | None], board: Board, epoch: int, clock: Clock) -> None:
    """The line of a step. Seconds are this rank's, but for what the slowest rank cost: the mean of the others' wait for it.
    What the strategy spent in communication is not its update. Independent."""
    at, seconds = job.position, clock.take()
    sent_bytes, comm_seconds = job.transport.take()
    seconds["comm_wait_seconds"] += comm_seconds
    seconds["update_seconds"] -= comm_seconds
    speed = board.tokens / seconds["step_seconds"]
    slowest = int(board.seconds.argmax())
    line = {
        "step": at.step, **learned, "tokens": at.tokens, "tokens_per_second": speed, "mfu": job.mfu(speed), "epoch": epoch,
        **seconds, "slowest_rank": slowest, "slowest_cost_seconds": float(board.seconds[slowest] - board.seconds.mean()),
        "comm_bytes": sent_bytes, "skipped": at.skipped,
    }
    job.record(line)
    job.progress.step(line)


def noise(job: Job, measured: Noise | None) -> dict[str, float | None]:
    """What the step's line says of the gradient noise scale; nothing when it was not measured. Independent."""
    if measured is None:
        return {}
    job.position.noise.add(measured)
    return {
        "noise_signal_square": measured.signal_square, "noise_trace": measured.trace,
        "noise_scale_tokens": job.position.noise.noise_scale_tokens,
    }


def rebalance(job: Job, board: Board, loader: Loader) -> None:
    """Perhaps share the lanes out anew from here on. The same on every rank. Independent."""
    words = job.balance.observe(board.seconds.tolist(), [int(n) for n in board.counts])
    if words:
        mine = job.balance.ranges[job.comm.rank]
        loader.expect([v for lane in mine for v in job.lanes.micro_batches(lane)])
        job.record({"event": "balance", "step": job.position.step, "lanes": [len(lanes) for lanes in job.balance.ranges]})
        job.progress.say(f"step {job.position.step}  {words}")


def audit_weights(job: Job, now: bool = False) -> None:
    """Where it is due, or now: do all replicas hold the same bits? Damaged when they do not and no majority knows better.
    Collective over job.comm."""
    step = job.position.step
    for flip in () if now else job.faults.flips(step):
        flip_bit(list(job.engine.model.parameters())[flip.tensor], flip.bit)
    if not (job.audit.due(step) or (now and job.audit.every)):
        return
    finding = job.audit.weights()
    if finding is None:
        return
    say_finding(job, step, finding, "repaired" if finding.repaired else "back to the last checkpoint")
    if not finding.repaired:
        raise Damaged.on_every_rank(f"step {step}: ranks {finding.ranks}: {finding.what}")


def flip_bit(p: torch.Tensor, bit: int) -> None:
    """A fault on purpose. Independent."""
    with torch.no_grad():
        first = p.view(-1)[:1].view(torch.int32)
        first.bitwise_xor_(1 << bit if bit < 31 else -(1 << 31))


def skip(job: Job, batch: int, grad_norm: float) -> None:
    """Count and log a batch that made no update; MpidpError after max_skipped in a row. The same on every rank. Independent."""
    at = job.position
    at.skipped, at.skipped_in_a_row = at.skipped + 1, at.skipped_in_a_row + 1
    job.record({"event": "skipped", "step": at.step, "batch": batch, "grad_norm": grad_norm})
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
    job.record({"step": at.step, "val_loss": loss, "val_tokens": tokens})
    job.progress.say(f"step {at.step}  val_loss {loss:.4f}  ({tokens:,} tokens)")


def save(job: Job, end: dict[str, Any] | None = None) -> None:
    """A checkpoint at this step. Collective over job.comm."""
    at = job.position
    if job.saved_step == at.step and end is None:
        return  # batches skipped since then are skipped again by whoever resumes
    job.watchdog.beat(f"checkpoint at step {at.step}")
    audit_weights(job, now=True)  # what a run goes back to must be right
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


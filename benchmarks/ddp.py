"""Trains with torch's DistributedDataParallel over gloo, with the same model, batches and held-out tokens as mpidp.train.

    mpirun -np 2 python benchmarks/ddp.py --hook fp16 --train.steps=100 --run.dir=runs/ddp ...

Settings are those of mpidp.train (adam, adamw and sgd; float32 on the CPU), and RUN/metrics.jsonl has the same names. MPI is used
to distribute the data and for evaluation, as in mpidp.train. Within a step, all messages are sent by gloo. gloo uses the
interface GLOO_SOCKET_IFNAME if it is set, and MASTER_ADDR as rank 0's address. `--hook none` is DDP's default, `fp16` sends
float16, and `powersgd` sends factors of rank 4 (torch.distributed.algorithms.ddp_comm_hooks). A file RUN/STOP ends the run at the
next evaluation.

As in mpidp.train, the loss of a rank is divided by the tokens of the global batch. Therefore, with `--hook none` the losses equal
the losses of strategy.name=synchronous up to rounding.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from mpidp.config.command_line import from_args
from mpidp.data.loader import Batch, Loader
from mpidp.errors import UsageError
from mpidp.faults.inject import faults_from_environment
from mpidp.metrics.jsonl import MetricsFile
from mpidp.model.transformer import Transformer
from mpidp.parallel.engine import Engine
from mpidp.parallel.grid import make_grid
from mpidp.runtime.command import begin, run_entry
from mpidp.runtime.observers import StepObservers
from mpidp.training.lr_schedule import Schedule
from mpidp.training.run_plan import RunPlan, plan

HOOKS = ("none", "fp16", "powersgd")
RANK, EXACT_STEPS = 4, 10  # PowerSGD: rank of the factors, and steps before it starts (torch's default of 1,000 is for long runs)


class Ddp:
    """The model and the optimizer. The object also measures the bytes sent and the wait time of each step."""

    def __init__(self, planned: RunPlan, hook: str) -> None:
        """Collective over planned.world."""
        world, optim = planned.world, planned.config.optim
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = world.bcast(probe.getsockname()[1])
        os.environ |= {"MASTER_PORT": str(port), "RANK": str(world.rank), "WORLD_SIZE": str(world.size)}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        dist.init_process_group("gloo", init_method="env://")
        self.size, self.clip = world.size, optim.clip
        self.observers = StepObservers([faults_from_environment(world.rank)], lambda: self.steps)
        self.steps = 0
        self.plain = Transformer(planned.shape, planned.config.train.seed)
        # PowerSGD's hook reduces twice per bucket, from callbacks in no fixed order: with several buckets gloo could mix them up
        one_bucket = sum(4 * p.numel() for p in self.plain.parameters()) / 2**20 + 1 if hook == "powersgd" else None
        self.model = torch.nn.parallel.DistributedDataParallel(self.plain, bucket_cap_mb=one_bucket, gradient_as_bucket_view=True)
        self.last_bucket, self.sent_bytes, self.waited = 0.0, 0, 0.0
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=RANK, start_powerSGD_iter=EXACT_STEPS)
        hooks: dict[str, tuple[Any, Callable[..., Any]]] = {
            "none": (None, default_hooks.allreduce_hook), "fp16": (None, default_hooks.fp16_compress_hook),
            "powersgd": (state, powerSGD_hook.powerSGD_hook),
        }
        state, send = hooks[hook]
        width = {"none": 4, "fp16": 2, "powersgd": 0}[hook]  # bytes per value; unknown for PowerSGD

        def watched(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            self.last_bucket = time.perf_counter()  # all gradients are computed when the last one is full
            self.sent_bytes += bucket.buffer().numel() * width * 2 * (self.size - 1) // self.size
            return send(state, bucket)

        watched.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}  # DDP looks at these
        self.model.register_comm_hook(state, watched)
        groups = [{"params": [p for p in self.plain.parameters() if (p.dim() >= 2) == decays],
                   "weight_decay": optim.weight_decay * decays} for decays in (True, False)]
        if optim.name == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=optim.beta1, fused=True)
        else:
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optim.name]
            self.optimizer = kind(groups, betas=(optim.beta1, optim.beta2), fused=True)

    def step(self, batch: Batch, mine: list[int], tokens: int, lr: float) -> None:
        """Make a step. tokens: number of target tokens of the global batch. Collective over all ranks."""
        for v in mine:
            mb = batch[v]
            with self.observers.span("micro_batch"), contextlib.nullcontext() if v == mine[-1] else self.model.no_sync():
                logits = self.model(mb.tokens)
                loss = F.cross_entropy(logits.flatten(0, 1), mb.targets.flatten(), ignore_index=-100, reduction="sum")
                (loss * (self.size / tokens)).backward()  # DDP takes the mean over ranks
                if v == mine[-1]:
                    self.waited += time.perf_counter() - self.last_bucket
        self.steps += 1
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.plain.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def take(self) -> dict[str, float | None]:
        taken = {"comm_bytes": self.sent_bytes or None, "comm_wait_seconds": self.waited}
        self.sent_bytes, self.waited = 0, 0.0
        return taken


def main() -> None:
    words = sys.argv[1:]
    hook = words.pop(words.index("--hook") + 1) if "--hook" in words else "none"
    config, world = begin(lambda: from_args([word for word in words if word != "--hook"]))
    if hook not in HOOKS or config.optim.name not in ("adam", "adamw", "sgd"):
        raise UsageError(f"--hook is one of {', '.join(HOOKS)}, optim.name adam, adamw or sgd")
    planned = plan(config, make_grid(world))
    world, lanes, t, o = planned.world, planned.lanes, planned.config.train, planned.config.optim
    run_dir = Path(config.run.dir)
    mine = [v for lane in lanes.of_rank(world.rank, world.size) for v in lanes.micro_batches(lane)]
    schedule = Schedule(o.schedule, o.lr, o.min_lr, o.warmup_steps, t.steps)
    ddp = Ddp(planned, hook)
    engine = Engine(ddp.plain, planned.device, torch.float32, t.seed, 0.0, 1)
    loader = Loader(planned.training, planned.sampler, mine, planned.device, 0)
    run_dir.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(run_dir / "metrics.jsonl", 0, 0) if world.rank == 0 else None
    learned, stop = 0, False
    for step in range(1, t.steps + 1):
        began = time.perf_counter()
        batch = next(loader)
        tokens = planned.sampler.batch_sequences(batch.batch) * config.model.seq_len
        ddp.step(batch, mine, tokens, schedule.lr_at(step))
        learned += tokens
        line = {"step": step, "tokens": learned, "step_seconds": time.perf_counter() - began, **ddp.take()}
        if metrics is not None:
            metrics.write(line)
        if step == t.steps or (t.eval_every and step % t.eval_every == 0):
            assert planned.validation is not None
            loss, counted = engine.evaluate(planned.validation, world, config.model.seq_len, t.micro_batch, t.eval_tokens)
            stop = world.bcast((run_dir / "STOP").exists())
            if metrics is not None:
                metrics.write({"step": step, "val_loss": loss, "val_tokens": counted})
        if stop:
            break
    loader.close()
    if metrics is not None:
        metrics.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_entry(main)

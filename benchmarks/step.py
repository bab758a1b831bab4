"""Compares the training step with its lower limit and with other implementations, for the same model and batch.

    mpirun -np 2 python benchmarks/step.py [--model 14M] [--global-batch 8] [--micro-batch 1] [--seq-len 128] [--repeats 9]

Variants run in turn, step by step, within one launch. `limit` is the same step without the reduction, in which each rank updates
with its own gradient. The additional time of a variant is the communication that does not overlap. `ddp gloo` is torch's
DistributedDataParallel. `heat` is Heat's DataParallel, if it is installed. In `1 rank` and `1 rank, P threads`, one rank computes
the whole batch while the other ranks sleep. In `independent`, each of P ranks computes the lanes of one rank, without any
communication. This is the limit for P processes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from inside import MODELS, WORLD, Stepper, config_of, corpus, in_turns, medians, ratio
from mpi4py import MPI

from mpidp.model.transformer import Transformer
from mpidp.runtime.command import run_entry


class Limit(Stepper):
    """A step without the reduction."""

    def __init__(self, comm, config) -> None:
        super().__init__(comm, config)
        reducer = self.job.strategy.reducer
        reducer.finish = lambda: (reducer.discard(), reducer.buffer.point(0))


class Ddp:
    """torch's DDP. It averages the means of the ranks, in buckets during the last backward."""

    def __init__(self, ours: Stepper) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = WORLD.bcast(probe.getsockname()[1])
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=WORLD.rank, world_size=WORLD.size)
        job = ours.job
        self.micro_batches = [ours.batch[v] for lane in job.balance.ranges[WORLD.rank] for v in job.lanes.micro_batches(lane)]
        model = Transformer(job.engine.model.shape, 1)
        self.model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        gains = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)

    def __call__(self) -> None:
        torch.set_num_threads(1)
        for i, mb in enumerate(self.micro_batches):
            last = i + 1 == len(self.micro_batches)
            with contextlib.nullcontext() if last else self.model.no_sync():
                logits = self.model(mb.tokens)
                loss = F.cross_entropy(logits.flatten(0, 1), mb.targets.flatten())
                (loss / len(self.micro_batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Heat(Ddp):
    """Heat's DataParallel with blocking communication, which calls Allreduce once per parameter."""

    def __init__(self, ours: Stepper) -> None:
        import heat as ht

        job = ours.job
        self.micro_batches = [ours.batch[v] for lane in job.balance.ranges[WORLD.rank] for v in job.lanes.micro_batches(lane)]
        model = Transformer(job.engine.model.shape, 1)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        averaging = ht.optim.DataParallelOptimizer(self.optimizer, True)
        self.model = ht.nn.DataParallel(model, ht.communication.MPI_WORLD, averaging, blocking_parameter_updates=True)
        self.model.no_sync = contextlib.nullcontext  # Heat has no no_sync: it averages after every backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="14M", choices=list(MODELS))
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peers", default="ddp,heat,alone", help="other variants to run (empty for none)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder, _ = corpus()
    peers, batch = options.peers.split(","), options.global_batch
    first = WORLD.Split(0 if WORLD.rank == 0 else MPI.UNDEFINED)

    def config(**sections):
        return config_of(folder, options.model, batch, options.micro_batch, options.seq_len, **sections)

    out, held = None, open(os.devnull, "w")  # noqa: SIM115
    with contextlib.redirect_stdout(held if WORLD.rank == 0 else out or held):
        ours = Stepper(WORLD, config())
        variants = {
            "limit": Limit(WORLD, config(comm={"transport": "messages"})),
            "tree, window": ours,
            "tree, window, a copy a rank": Stepper(WORLD, config(comm={"copies": "rank"})),
            "tree, messages": Stepper(WORLD, config(comm={"transport": "messages"})),
            "allreduce": Stepper(WORLD, config(comm={"reducer": "allreduce"})),
        }
        if "ddp" in peers:
            variants["ddp gloo"] = Ddp(ours)
        if "heat" in peers and importlib.util.find_spec("heat"):
            variants["heat"] = Heat(ours)
        if "alone" in peers:
            share_of = config_of(folder, options.model, batch // WORLD.size, options.micro_batch, options.seq_len)
            variants["independent"] = Stepper(MPI.COMM_SELF, share_of)
            alone = first != MPI.COMM_NULL
            variants["1 rank"] = Stepper(first, config()) if alone else None
            variants[f"1 rank, {WORLD.size} threads"] = (
                Stepper(first, config(train={"threads": WORLD.size})) if alone else None
            )
    found = in_turns(variants, options.repeats)
    middle, tokens = medians(found), batch * options.seq_len
    if WORLD.rank == 0:
        print(f"{WORLD.size} ranks, {options.model}, {batch} sequences of {options.seq_len} per step in micro-batches of "
              f"{options.micro_batch}; medians of {options.repeats}")
        print(f"{'variant':<30} {'step ms':>9} {'tokens/s':>10} {'exposed':>9}")
        for name, seconds in middle.items():
            exposed = f"{100 * (ratio(found, name, 'limit') - 1):>8.1f}%" if "rank" not in name or "copy" in name else ""
            print(f"{name:<30} {1e3 * seconds:>9.1f} {tokens / seconds:>10,.0f} {exposed}")
        if "1 rank" in middle:
            gain, limit = ratio(found, "1 rank", "tree, window"), ratio(found, "independent", "tree, window")
            print(f"strong scaling efficiency 1 -> {WORLD.size}: {gain / WORLD.size:.3f}; relative to independent processes: "
                  f"{limit:.3f}")
        if "heat" in peers and "heat" not in variants:
            print("heat: skipped, not installed (pip install heat)")
        shutil.rmtree(Path(folder))
    WORLD.Barrier()
    os._exit(0)  # skips freeing the windows and gloo threads of many variants


if __name__ == "__main__":
    run_entry(main)

"""Measures how much training time a checkpoint takes, for several ways of saving.

    mpirun -np 2 python benchmarks/checkpoint.py [--layers 9] [--global-batch 16] [--seq-len 128] [--steps 10] [--repeats 7]

The default model has 16 M parameters (64 MB). A checkpoint has 193 MB, because it includes the optimizer's moments. `stall` is
the time for which a save stops the training. This is the whole save, or for `beside training` only its start and the wait for the
copy before the next update. `lost` is the additional time of `--steps` steps that begin with a save, compared with the same
number of steps without a save. It includes the slowdown of training by copying and writing on the same cores. `stall` and `lost`
are medians over the repeats, on the slowest rank.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import time
from dataclasses import replace

import torch
from inside import WORLD, Stepper, config_of, corpus
from mpi4py import MPI

from mpidp.checkpoint.saver import Saver
from mpidp.runtime.command import run_entry
from mpidp.training.checkpoints import save


class Saving(Stepper):
    """Runs steps, with or without a save before the first one."""

    def __init__(self, config) -> None:
        super().__init__(WORLD, config)
        beside = self.job.saver
        self.savers = {
            "beside training": beside,
            "standing still": Saver(WORLD, beside.run_dir, 0, 1, beside.share),
            "standing still, a file a rank": Saver(WORLD, beside.run_dir, 0, 1, (WORLD.rank, WORLD.size)),
        }
        self.stalled, plain = 0.0, beside.wait_for_copy

        def wait_for_copy() -> None:
            began = time.perf_counter()
            plain()
            self.stalled += time.perf_counter() - began

        beside.wait_for_copy = wait_for_copy

    def run(self, way: str, steps: int) -> tuple[float, float]:
        """Return (seconds of `steps` steps, seconds for which training was stopped) on the slowest rank. Collective over
        WORLD."""
        self.stalled = 0.0
        WORLD.Barrier()
        began = time.perf_counter()
        if way in self.savers:
            self.job = replace(self.job, saver=self.savers[way])
            save(self.job, wait=way != "beside training")
            self.stalled += time.perf_counter() - began
        for _ in range(steps):
            self()
            self.job.position.step += 1
        spent = time.perf_counter() - began
        self.job.saver.wait_for_save(must=True)  # not timed, because in training further steps would run meanwhile
        return WORLD.allreduce(spent, op=MPI.MAX), WORLD.allreduce(self.stalled, op=MPI.MAX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder, _ = corpus()
    config = config_of(folder, "14M", options.global_batch, 1, options.seq_len).with_values(
        model={"num_layers": options.layers}, run={"keep": 1}
    )
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
        training = Saving(config)
        ways = ["no save", *training.savers]
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for repeat in range(options.repeats + 1):
            for way in ways:
                taken = training.run(way, options.steps)
                if repeat:
                    found[way].append(taken)
    if WORLD.rank == 0:
        parameters = sum(p.numel() for p in training.job.engine.model.parameters())
        plain = statistics.median(seconds for seconds, _ in found["no save"])
        step = plain / options.steps
        size = sum(f.stat().st_size for f in (folder / "run/checkpoints").glob("step_*/*"))
        print(f"{WORLD.size} ranks, {parameters / 1e6:.1f} M parameters ({4 * parameters / 1e6:.0f} MB), {size / 1e6:.0f} MB a "
              f"checkpoint; a step takes {1e3 * step:.0f} ms; medians of {options.repeats}")
        print(f"{'way':<32} {'stall ms':>9} {'of a step':>10} {'lost ms':>9} {'of a step':>10}")
        for way in ways[1:]:
            stall = statistics.median(stalled for _, stalled in found[way])
            lost = statistics.median(a - b for (a, _), (b, _) in zip(found[way], found["no save"], strict=True))
            print(f"{way:<32} {1e3 * stall:>9.1f} {100 * stall / step:>9.1f}% {1e3 * lost:>9.0f} {100 * lost / step:>9.0f}%")
        shutil.rmtree(folder)
    WORLD.Barrier()


if __name__ == "__main__":
    run_entry(main)

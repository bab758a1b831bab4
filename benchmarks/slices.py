"""Measures what model.slices costs: the training step with 1 (off), 2 and 4 slices, for the same model and batch.

    mpirun -np N python benchmarks/slices.py [--model 14M] [--heads 8] [--global-batch 2] [--micro-batch 1] [--seq-len 512]

All N ranks compute each layer together (mesh.tp=N). Variants run in turn, step by step, within one launch. The ratios are
medians over pairs of steps.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil

import torch
from inside import MODELS, WORLD, Stepper, config_of, corpus, in_turns, medians, ratio

from mpidp.runtime.command import run_entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="14M")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--global-batch", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder, _ = corpus()
    variants, sent = {}, {}
    with contextlib.redirect_stdout(open(os.devnull, "w")):  # noqa: SIM115
        for slices in [s for s in (1, 2, 4) if s == 1 or s % WORLD.size == 0]:
            config = config_of(folder, options.model, options.global_batch, options.micro_batch, options.seq_len,
                               mesh={"tp": WORLD.size})
            config = config.with_values(model={"num_heads": options.heads, "slices": slices})
            name = f"{slices} slices" if slices > 1 else "without slices"
            variants[name] = Stepper(WORLD, config)
    for name, stepper in variants.items():
        stepper.job.transport.pop_counts()
        stepper()
        sent[name] = stepper.job.transport.pop_counts()[0]
    found = in_turns(variants, options.repeats)
    if WORLD.rank == 0:
        print(f"tp {WORLD.size}, {options.model}, {options.heads} heads, {options.global_batch} sequences of {options.seq_len} "
              f"per step in micro-batches of {options.micro_batch}; medians of {options.repeats}")
        for name, seconds in medians(found).items():
            times = ratio(found, name, "without slices")
            print(f"{name:<16} {1e3 * seconds:>9.1f} ms  {times:>6.3f}  {sent[name]:>12,} bytes sent")
        shutil.rmtree(folder)


if __name__ == "__main__":
    run_entry(main)

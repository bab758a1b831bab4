"""Measures the cost of bit-for-bit reproducible sums: compares the tree with MPI_Allreduce, on one node and on two simulated
nodes.

    mpirun -np 2 python benchmarks/exact.py [--models 1M,14M,50M] [--micro-batches 8] [--seq-len 128] [--repeats 9]

Variants run in turn, step by step. `cost` is the median of (time of a step / time of a step with allreduce in the same repeat) -
1. `sent MB` is what rank 0 sends in a step. `ring MB` is 2 n (P-1)/P for n gradient bytes, which a ring allreduce would send.
`extra MB` is the memory in addition to one gradient buffer per rank: the other slots of the tree and the scratch buffers of the
transport. Strict BLAS makes the bits independent of the number of threads. Its cost is not included (see docs/results). Simulated
nodes share one machine, so their messages are memory copies. Byte counts are correct, but times are not those of a network.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil

import torch
from inside import MODELS, WORLD, Stepper, config_of, corpus, in_turns, medians, ratio

from mpidp.runtime.command import run_entry


def extra_bytes(stepper: Stepper) -> int:
    job = stepper.job
    slots = (job.strategy.reducer.num_slots - 1) * job.strategy.buffer.num_elements * 4
    return slots + sum(4 * held.numel() for held in job.transport._scratch.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--micro-batches", type=int, default=8, help="micro-batches per step, of one sequence each")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder, _ = corpus()
    if WORLD.rank == 0:
        print(f"{WORLD.size} ranks, {options.micro_batches} micro-batches of 1 x {options.seq_len} tokens a step, medians of "
              f"{options.repeats}")
        print(f"{'model':<6} {'nodes':>5} {'variant':<16} {'step ms':>9} {'cost':>7}"
              f" {'sent MB':>9} {'ring MB':>9} {'extra MB':>9}")
    for model in options.models.split(","):
        for nodes in (1, 2):
            os.environ["MPIDP_PRETEND_NODES"] = str(nodes)
            with contextlib.redirect_stdout(open(os.devnull, "w")):  # noqa: SIM115
                steppers = {
                    name: Stepper(WORLD, config_of(folder, model, options.micro_batches, 1, options.seq_len, comm=comm))
                    for name, comm in {
                        "allreduce": {"reducer": "allreduce", "overlap": "none"},
                        "tree, messages": {"transport": "messages", "overlap": "none"},
                        "tree, window": {"overlap": "none"},
                    }.items()
                }
            found = in_turns(dict(steppers), options.repeats)
            for name, seconds in medians(found).items():
                stepper = steppers[name]
                stepper.job.transport.pop_counts()
                stepper()
                sent = stepper.job.transport.pop_counts()[0]
                ring = 2 * 4 * stepper.job.strategy.buffer.num_elements * (WORLD.size - 1) / WORLD.size
                if WORLD.rank == 0:
                    print(f"{model:<6} {nodes:>5} {name:<16} {1e3 * seconds:>9.1f} "
                          f"{100 * (ratio(found, name, 'allreduce') - 1):>6.1f}% {sent / 1e6:>9.1f} {ring / 1e6:>9.1f} "
                          f"{extra_bytes(stepper) / 1e6:>9.1f}", flush=True)
            for stepper in steppers.values():
                stepper.job.balance.close()
                stepper.job.strategy.close()
    if WORLD.rank == 0:
        shutil.rmtree(folder)


if __name__ == "__main__":
    run_entry(main)

"""Compares torch.distributed over the backend mpi4py with torch.distributed over gloo, within one launch.

    mpirun -np 2 python benchmarks/c10d.py [--kib 1,64,1024,16384,65536] [--models 14M,50M] [--repeats 15] [--json]

It measures `all_reduce` of float32 buffers (sizes in KiB), and a step (forward, backward, SGD) of torch's DistributedDataParallel
on MLPs (sizes in parameters) with a small batch. The two backends run in turn. Medians over the repeats are printed. The ratio is
gloo's time divided by mpi4py's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mpidp.c10d  # noqa: F401
from mpidp.runtime.command import run_entry

WIDTHS = {"1M": 360, "14M": 1365, "50M": 2580}  # width of each of 8 square layers, by number of parameters
LAYERS, BATCH = 8, 8


def in_turns(works: dict[str, Callable[[], Any]], repeats: int, before: Callable[[str], Any] = str) -> dict[str, float]:
    """Return the median seconds of each function on the slowest rank. before(name) runs before each function, and is not timed.
    Collective over all ranks."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            before(name)
            dist.barrier()
            began = time.perf_counter()
            work()
            seconds = torch.tensor([time.perf_counter() - began])
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if repeat:  # the first repeat opens connections
                taken[name].append(seconds.item())
    return {name: statistics.median(times) for name, times in taken.items()}


def stepper(group: Any, width: int) -> Callable[[], None]:
    torch.manual_seed(0)
    layers = [part for _ in range(LAYERS) for part in (nn.Linear(width, width), nn.ReLU())]
    model = DistributedDataParallel(nn.Sequential(*layers), process_group=group)
    optimizer, x = torch.optim.SGD(model.parameters(), 1e-3), torch.randn(BATCH, width)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kib", default="1,16,64,256,1024,4096,16384,65536")
    parser.add_argument("--models", default="14M,50M")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("mpi4py", init_method="mpi://")
    groups = {"mpi4py": dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}
    rows = []
    for kib in filter(None, options.kib.split(",")):
        buffers = {name: torch.ones(int(kib) * 256) for name in groups}
        works = {name: (lambda b=buffers[name], g=groups[name]: dist.all_reduce(b, group=g)) for name in groups}
        rows.append((f"all_reduce {kib} KiB", in_turns(works, options.repeats, lambda name, b=buffers: b[name].fill_(1.0))))
        assert all(float(buffer[-1]) == dist.get_world_size() for buffer in buffers.values())
    for name in filter(None, options.models.split(",")):
        rows.append((f"DDP step {name}", in_turns({kind: stepper(group, WIDTHS[name]) for kind, group in groups.items()},
                                                  options.repeats)))
    if dist.get_rank() == 0:
        for what, seconds in rows:
            ratio = seconds["gloo"] / seconds["mpi4py"]
            if options.json:
                print(json.dumps({"what": what, "ranks": dist.get_world_size(), "ratio": round(ratio, 3)} | seconds))
            else:
                ours, theirs = 1e3 * seconds["mpi4py"], 1e3 * seconds["gloo"]
                print(f"{what:22s} mpi4py {ours:9.3f} ms   gloo {theirs:9.3f} ms   {ratio:5.2f}x")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_entry(main)

"""Compares torch.distributed over the backend mpi4py with torch.distributed over gloo, within one launch.

    mpirun -np 2 python benchmarks/c10d.py [--calls all_reduce,broadcast] [--kib 1,64,1024,16384,65536] [--models 14M,50M]
                                           [--repeats 15] [--json]

It measures collectives of float32 buffers. Sizes are those of the larger buffer, in KiB. It also measures a step (forward,
backward, SGD) of torch's DistributedDataParallel with a small batch, on MLPs of several numbers of parameters. Exposed
communication is the time of this step minus the time of a step without communication (no_sync). The two backends run in turn.
Medians over the repeats are printed. The ratio is gloo's time divided by mpi4py's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mpidp.c10d  # noqa: F401
from mpidp.runtime.command import run_entry

WIDTHS = {"1M": 360, "14M": 1365, "50M": 2580}  # width of each of 8 square layers, by number of parameters
LAYERS, BATCH = 8, 8
CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor, Any], Any]] = {  # (whole buffer, this rank's part, group)
    "all_reduce": lambda whole, part, group: dist.all_reduce(whole, group=group),
    "reduce_scatter": lambda whole, part, group: dist.reduce_scatter_single(part, whole, group=group),
    "all_gather": lambda whole, part, group: dist.all_gather_single(whole, part, group=group),
    "broadcast": lambda whole, part, group: dist.broadcast(whole, 0, group=group),
}


def in_turns(works: Mapping[str, Callable[[], Any]], repeats: int, before: Callable[[str], Any] = str) -> dict[str, float]:
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


def measure_call(name: str, kib: int, groups: dict[str, Any], repeats: int) -> dict[str, float]:
    """Return the seconds of a collective by backend. Collective over all ranks."""
    ranks = dist.get_world_size()
    part = torch.ones(kib * 256 // ranks)
    wholes = {kind: torch.ones(len(part) * ranks) for kind in groups}
    works = {kind: (lambda w=wholes[kind], g=group: CALLS[name](w, part, g)) for kind, group in groups.items()}
    seconds = in_turns(works, repeats, lambda kind: (wholes[kind].fill_(1.0), part.fill_(1.0)))
    assert all(float(whole[-1]) == (ranks if name == "all_reduce" else 1) for whole in wholes.values())
    return seconds


def stepper(group: Any, width: int) -> Callable[..., None]:
    torch.manual_seed(0)
    layers = [part for _ in range(LAYERS) for part in (nn.Linear(width, width), nn.ReLU())]
    model = DistributedDataParallel(nn.Sequential(*layers), process_group=group)
    optimizer, x = torch.optim.SGD(model.parameters(), 1e-3), torch.randn(BATCH, width)

    def step(communicate: bool = True) -> None:
        optimizer.zero_grad()
        with nullcontext() if communicate else model.no_sync():
            model(x).square().mean().backward()
        optimizer.step()

    return step


def measure_step(width: int, groups: dict[str, Any], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return (seconds of a step, seconds of its exposed communication) by backend. Collective over all ranks."""
    steps = {kind: stepper(group, width) for kind, group in groups.items()}
    alone = {f"{kind} alone": (lambda step=step: step(communicate=False)) for kind, step in steps.items()}
    seconds = in_turns({**steps, **alone}, repeats)
    without = min(seconds.pop(f"{kind} alone") for kind in groups)
    return seconds, {kind: max(1e-9, one - without) for kind, one in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", default="all_reduce", help=f"of {', '.join(CALLS)} (default: %(default)s)")
    parser.add_argument("--kib", default="1,16,64,256,1024,4096,16384,65536")
    parser.add_argument("--models", default="14M,50M")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("mpi4py", init_method="mpi://")
    groups = {"mpi4py": dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}
    rows = []
    for name in filter(None, options.calls.split(",")):
        for kib in filter(None, options.kib.split(",")):
            rows.append((f"{name} {kib} KiB", measure_call(name, int(kib), groups, options.repeats)))
    for name in filter(None, options.models.split(",")):
        step, exposed = measure_step(WIDTHS[name], groups, options.repeats)
        rows += [(f"DDP step {name}", step), (f"exposed, {name}", exposed)]
    if dist.get_rank() == 0:
        for what, seconds in rows:
            ratio = seconds["gloo"] / seconds["mpi4py"]
            if options.json:
                print(json.dumps({"what": what, "ranks": dist.get_world_size(), "ratio": round(ratio, 3)} | seconds))
            else:
                ours, theirs = 1e3 * seconds["mpi4py"], 1e3 * seconds["gloo"]
                print(f"{what:24s} mpi4py {ours:9.3f} ms   gloo {theirs:9.3f} ms   {ratio:5.2f}x")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_entry(main)

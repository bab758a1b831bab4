"""Compares the time to average gradient buckets with mpidp's reducers, with torch's gloo and with a plain memory copy.

    mpirun -np 2 python benchmarks/average.py [--mb 1,16,64] [--repeats 15] [--json]

Every method averages the same float32 gradients (size in MB). The measured time begins when all gradients are written and ends
when every rank can read the sum. `memcpy` is the lower limit: every rank copies the same number of bytes once. Methods run in
turn within each repeat. Medians over the repeats are printed. Ratios vary less than times between calls. `wrong` is the number of
elements that differ from the exact sum by more than rounding allows. It must be 0.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from mpi4py import MPI

from mpidp.comm.group import alone, by_node
from mpidp.comm.transport import Messages
from mpidp.data.lanes import Lanes
from mpidp.reducers.buckets import GradientBuffer
from mpidp.reducers.tree import REDUCERS
from mpidp.runtime.command import run_entry
from mpidp.runtime.topology import make_topology
from mpidp.training.balance import Even, Terms

CPU = torch.device("cpu")


def join_gloo(world: MPI.Intracomm) -> None:
    """Start torch.distributed with gloo in the same processes. Collective over world."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = world.bcast(probe.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=world.rank, world_size=world.size)


class Method:
    """A reducer of mpidp. fill() writes the gradients, and run() averages them. `total` is a view of the sum."""

    def __init__(self, kind: str, world: MPI.Intracomm, window: bool, elements: int) -> None:
        mesh, lanes = make_topology(world), Lanes(world.size, 1)
        group = by_node(mesh) if window else alone(mesh)
        self.reducer = REDUCERS[kind](group, lanes, Messages(CPU), Even(Terms(world.size, world.size, world.rank)))
        parameter = [("w", torch.nn.Parameter(torch.zeros(elements)))]
        self.buffer = GradientBuffer(parameter, 1, 4 << 20, lambda n: group.memory(n, CPU), group.node.rank)
        self.reducer.attach(self.buffer)
        self.rank, self.elements, self.group = world.rank, elements, group

    def fill(self, gradient: torch.Tensor) -> None:
        self.reducer.open(self.rank)
        self.buffer.flat[0, : self.elements] = gradient
        self.reducer.close(self.rank)

    def run(self) -> None:
        self.reducer.finish()

    @property
    def total(self) -> torch.Tensor:
        return self.buffer.total[: self.elements]


class Gloo:
    def __init__(self, elements: int) -> None:
        self.total = torch.zeros(elements)

    def fill(self, gradient: torch.Tensor) -> None:
        self.total.copy_(gradient)

    def run(self) -> None:
        dist.all_reduce(self.total)


class Copy:
    def __init__(self, elements: int) -> None:
        self.total, self.target = torch.zeros(elements), torch.zeros(elements)

    def fill(self, gradient: torch.Tensor) -> None:
        self.total.copy_(gradient)

    def run(self) -> None:
        self.target.copy_(self.total)


def seconds(work: Callable[[], None], world: MPI.Intracomm) -> float:
    """Return the time of the slowest rank after a common start. Collective over world."""
    world.Barrier()
    began = time.perf_counter()
    work()
    return world.allreduce(time.perf_counter() - began, op=MPI.MAX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", default="1,16,64")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    world = MPI.COMM_WORLD
    torch.set_num_threads(1)
    join_gloo(world)
    if world.rank == 0:
        print(f"{world.size} ranks, {MPI.Get_library_version().split(chr(10))[0][:40].strip(chr(0))}, torch {torch.__version__}")
        print(f"{'MB':>4} {'method':<18} {'ms':>9} {'x gloo':>8} {'x memcpy time':>14} {'wrong':>6}")
    for mb in (float(word) for word in options.mb.split(",")):
        elements = int(mb * 2**20) // 4
        gradients = [torch.randn(elements, generator=torch.Generator().manual_seed(r)) for r in range(world.size)]
        expected = sum(g.double() for g in gradients)
        allowed = 1e-6 * sum(g.double().abs() for g in gradients)
        methods = {
            "memcpy": Copy(elements), "gloo": Gloo(elements), "naive": Method("naive", world, False, elements),
            "allreduce": Method("allreduce", world, False, elements), "tree, messages": Method("tree", world, False, elements),
            "tree, window": Method("tree", world, True, elements),
        }
        spent: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(options.repeats + 2):
            for name, method in methods.items():
                method.fill(gradients[world.rank])
                spent[name].append(seconds(method.run, world))
        middle = {name: statistics.median(times[2:]) for name, times in spent.items()}
        for name, method in methods.items():
            wrong = 0 if name == "memcpy" else int(((method.total.double() - expected).abs() > allowed).sum())
            wrong = world.allreduce(wrong)
            if world.rank == 0:
                ms, times, limit = 1e3 * middle[name], middle["gloo"] / middle[name], middle[name] / middle["memcpy"]
                print(f"{mb:>4g} {name:<18} {ms:>9.3f} {times:>8.2f} {limit:>14.2f} {wrong:>6}", flush=True)
                if options.json:
                    print(json.dumps({"ranks": world.size, "mb": mb, "method": name, "ms": ms, "times_gloo": times,
                                      "memcpy_times": limit, "wrong": wrong}), flush=True)
        for method in methods.values():
            if isinstance(method, Method):
                method.group.fence()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_entry(main)

"""`mpirun -n 3 python -m mpi4py -m tests.mpis.program FOLDER`: short trainings in one job, in an existing folder.

Rank 0 prints one line of JSON: the weights' hash of each way to train, and the library.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import torch
from mpi4py import MPI
from torch import distributed

import mpidp.c10d
from tests.tiny import WORLD, Ran, corpus, pretended, tiny, train_at

WAYS = {  # name -> number of ranks, pretended nodes, settings
    "1 rank": (1, 1, {}),
    "2 ranks": (2, 1, {}),
    "3 ranks": (3, 1, {}),
    "window": (3, 1, {"comm": {"transport": "window"}}),
    "messages": (3, 1, {"comm": {"transport": "messages"}}),
    "two nodes": (3, 2, {}),
    "work stealing": (3, 1, {"train": {"balance": "steal"}}),
    "2 workers, 1 server": (3, 1, {"strategy": {"name": "server", "mode": "sync", "meet_every": 3}}),
    "int8": (2, 1, {"comm": {"compress": "int8"}}),
}


def train(folder: Path, name: str) -> Ran:
    """Train in one of the ways. Collective over WORLD."""
    ranks, nodes, sections = WAYS[name]
    config = tiny(corpus(folder), folder / name.replace(" ", "_"), **sections)
    with pretended(nodes):
        return train_at(ranks, config)


def c10d() -> list[float]:
    """Sums of torch.distributed. Collective over WORLD."""
    distributed.init_process_group("mpi4py", init_method="mpi://")
    sums = [torch.full((5000,), 1.0 + WORLD.rank), torch.arange(4.0) * WORLD.rank]
    for one in sums:
        distributed.all_reduce(one)
    held = [torch.zeros(1) for _ in range(WORLD.size)]
    distributed.all_gather(held, torch.tensor([float(WORLD.rank)]))
    distributed.destroy_process_group()
    return [float(sums[0].sum()), *sums[1].tolist(), *(float(one) for one in held)]


def main() -> None:
    folder = Path(sys.argv[1])
    with contextlib.redirect_stdout(io.StringIO()):
        found = {name: train(folder, name).sha256 for name in WAYS}
        sums = c10d()
    if WORLD.rank == 0:
        print(json.dumps({"library": " ".join(map(str, MPI.get_vendor())), "hashes": found, "c10d": sums}), flush=True)


if __name__ == "__main__":
    assert mpidp.c10d
    main()

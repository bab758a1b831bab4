"""`mpirun -np N python -m mpidp.train [CONFIG.toml] [--section.key=value ...]`: the whole program in reading order."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidp import config as configuration
from mpidp.config import Config
from mpidp.entry import begin, launcher_rank, run_entry

if TYPE_CHECKING:
    from mpi4py import MPI

USAGE = """usage: [mpirun -np N] python -m mpidp.train [CONFIG.toml] [--section.key=value ...] [--dry-run]

Trains a Transformer language model from HDF5 token shards with data parallelism over MPI. The weights that come out do not
depend on N. With no arguments it prepares shards of Python's own standard library and trains a small model on them."""

MOST_RETURNS = 3  # to the last checkpoint, in one command: a machine that fails more often is to be mended
DEFAULT_CORPUS = {"source": "stdlib", "tokenizer": "bpe:1024", "shards": 4, "val_fraction": 0.05, "seed": 0}


def main() -> None:
    """Command line -> run."""
    words = sys.argv[1:]
    if "--help" in words or "-h" in words:
        if launcher_rank() == 0:
            print(configuration.help_text(USAGE))
        return
    dry = "--dry-run" in words
    config, world = begin(lambda: configuration.from_args([word for word in words if word != "--dry-run"]))
    run(config, world, dry)


def run(config: Config, world: MPI.Intracomm, dry: bool = False) -> dict[str, Any] | None:
    """Build, restore, fit: one path for a new run and a resumed one. Returns the end record. Collective over world."""
    from mpidp import build, fit
    from mpidp.comm.mesh import make_mesh, together
    from mpidp.errors import Damaged
    from mpidp.inject import Faults, asked_for
    from mpidp.rundir import RunLock, find_checkpoint

    mesh = make_mesh(world)
    if not dry:
        build.prepare_default_corpus(config, world, DEFAULT_CORPUS)
    plan = build.plan(config, mesh)
    plan.say_what_runs()
    if dry:
        return None
    run_dir = Path(config.run.dir)
    lock: RunLock | None = None
    with together(world):
        lock = RunLock(run_dir) if world.rank == 0 else None
    faults = asked_for()
    events: list[dict[str, Any]] = []  # of replicas that were found to differ: the run goes back to its last checkpoint
    try:
        while True:
            reader, notes = find_checkpoint(run_dir, "auto" if events else config.run.resume, world)
            plan = plan.adopt(reader, notes)
            if reader is not None and (end := plan.has_ended(reader)) is not None:
                plan.say_ended(end)
                return end
            job = build.build(plan, faults)
            if reader is not None:
                fit.restore(job, reader)
            try:
                return fit.run_to_end(job, resumed=reader is not None, events=events)
            except Damaged as damage:
                if len(events) == MOST_RETURNS:
                    raise
                events.append({"event": "went_back", "why": str(damage)})
                faults = Faults()  # those on purpose happen once
    finally:
        if lock is not None:
            lock.release()


if __name__ == "__main__":
    run_entry(main)

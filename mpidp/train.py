"""`mpirun -np N python -m mpidp.train [CONFIG.toml] [--section.key=value ...]`: the whole program in reading order."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mpidp import arguments
from mpidp.config import Config
from mpidp.entry import begin, launcher_rank, newcomer, run_entry

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpidp.planned import Plan
    from mpidp.recover import Crew

USAGE = """usage: [mpirun -np N] python -m mpidp.train [CONFIG.toml] [--section.key=value ...] [--dry-run]

Trains a Transformer language model from HDF5 token shards with data parallelism over MPI. The weights that come out do not
depend on N. With no arguments it prepares shards of Python's own standard library and trains a small model on them."""

DEFAULT_CORPUS = {"source": "stdlib", "tokenizer": "bpe:1024", "shards": 4, "val_fraction": 0.05, "seed": 0}


def main() -> None:
    """Command line -> run."""
    words = sys.argv[1:]
    if "--help" in words or "-h" in words:
        if launcher_rank() == 0:
            print(arguments.help_text(USAGE))
        return
    if newcomer():
        from mpidp.comm.respawn import join

        world, crew = join()
        run(crew.config, world, crew=crew)
        return
    dry = "--dry-run" in words
    config, world = begin(lambda: arguments.from_args([word for word in words if word != "--dry-run"]))
    run(config, world, dry)


def run(config: Config, world: MPI.Intracomm, dry: bool = False, crew: Crew | None = None) -> dict[str, Any] | None:
    """Plan, then attempts until one reaches the end: one path for a new run, a resumed one, and one that goes on after ranks
    died. crew: told to a process that joins a running job. Returns the end record. Collective over world."""
    from mpidp.comm.faults import Lost
    from mpidp.course import Course
    from mpidp.errors import Damaged

    plan = _plan(config, world, dry) if crew is None else None  # newcomers make one with the others
    if dry:
        return None
    course = Course(config, plan, world if plan is None else plan.world, crew)
    error: BaseException | None = None
    try:
        while True:
            try:
                if (end := course.attempt()) is not None:
                    return end
            except Damaged as damage:
                course.go_back(damage)
            except Lost as failure:
                course.leave_the_dead(failure)
    except BaseException as failed:
        error = failed
        raise
    finally:
        course.close(error)


def _plan(config: Config, world: MPI.Intracomm, dry: bool) -> Plan:
    """What is to be run, checked, said, and with data to run on. Collective over world."""
    from mpidp import build
    from mpidp.comm.grid import make_grid
    from mpidp.comm.mesh import together
    from mpidp.comm.respawn import LAUNCH, why_not
    from mpidp.errors import UsageError

    grid = make_grid(world, config.mesh.tp, config.mesh.pp, config.mesh.dp)
    with together(world):
        if config.faults.respawn and world.rank == 0 and (reason := why_not(grid.everyone.num_machines)):
            raise UsageError(f"faults.respawn=true, but {reason}. Start with {LAUNCH} on one machine, or leave it false")
    if not dry:
        build.prepare_default_corpus(config, world, DEFAULT_CORPUS)
    plan = build.plan(config, grid)
    plan.say_what_runs()
    return plan


if __name__ == "__main__":
    run_entry(main)

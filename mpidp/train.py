"""Trains a model: `[mpirun -np N] python -m mpidp.train [CONFIG.toml] [--section.key=value ...] [--dry-run]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidp.config import command_line
from mpidp.config.schema import Config
from mpidp.runtime.command import Parser, begin, run_entry
from mpidp.runtime.environment import is_replacement_rank
from mpidp.runtime.log import log
from mpidp.runtime.options import program

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpidp.training.recovery import Crew
    from mpidp.training.run_plan import RunPlan

DESCRIPTION = """Train a Transformer language model from HDF5 token shards over MPI. By default, the weights do not depend on N,
the number of ranks.
Without arguments: prepare shards of the source of Python's standard library, and train a small model on them."""

DEFAULT_CORPUS = {"source": "stdlib", "tokenizer": "bpe:1024", "shards": 4, "val_fraction": 0.05, "seed": 0}


def main() -> None:
    """Read the command line and train. Collective over COMM_WORLD."""
    if is_replacement_rank():
        from mpidp.faults.respawn import join

        world, crew = join()
        run(crew.config, world, crew=crew)
        return
    (options, config), world = begin(lambda: read_options(sys.argv[1:]))
    run(config, world, options.dry_run)


def read_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Return the parsed command line, and the configuration with its settings. Raises UsageError if the command line is invalid.
    Pure, except for reading CONFIG.toml."""
    parser = Parser(
        prog=program("mpidp.train"), usage="[mpirun -np N] %(prog)s [CONFIG.toml] [--section.key=value ...] [--dry-run]",
        description=DESCRIPTION, epilog=command_line.settings_help(), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dry-run", action="store_true", help="check the configuration and the data, print them, and exit")
    return command_line.parse_with_settings(parser, arguments)


def run(config: Config, world: MPI.Intracomm, dry: bool = False, crew: Crew | None = None) -> dict[str, Any] | None:
    """Plan the run, and repeat attempts until one reaches the end of the run. An attempt ends early if ranks fail, or if the
    state is found to be damaged. Return the content of the `end` line of metrics.jsonl.

    This function also resumes runs. `dry`: only plan the run, and return None. `crew`: the facts about the run that a
    replacement rank has received, or None on other ranks. Collective over world.
    """
    from mpidp.errors import Damaged
    from mpidp.runtime.ulfm import RankFailure
    from mpidp.training.attempts import RunAttempts

    plan = _plan(config, world, dry) if crew is None else None  # replacement ranks make the plan later, with the other ranks
    if dry:
        return None
    attempts = RunAttempts(config, plan, world if plan is None else plan.world, crew)
    error: BaseException | None = None
    try:
        while True:
            try:
                if (end := attempts.attempt()) is not None:
                    return end
            except Damaged as damage:
                attempts.go_back(damage)
            except RankFailure as failure:
                attempts.drop_failed_ranks(failure)
    except BaseException as failed:
        error = failed
        raise
    finally:
        attempts.close(error)


def _plan(config: Config, world: MPI.Intracomm, dry: bool) -> RunPlan:
    """Check the configuration and the data, log a summary, and return the plan. Prepare the default corpus if needed. Collective
    over world."""
    from mpidp.errors import UsageError
    from mpidp.faults.respawn import LAUNCH, obstacle_to_respawn
    from mpidp.parallel.grid import make_grid
    from mpidp.runtime.world import raise_together
    from mpidp.training import micro_batch, run_plan, run_summary

    grid = make_grid(world, config.mesh.tp, config.mesh.pp, config.mesh.dp)
    with raise_together(world):
        if config.faults.respawn and world.rank == 0 and (reason := obstacle_to_respawn(grid.everyone.num_machines)):
            raise UsageError(f"faults.respawn=true, but {reason}. Start with {LAUNCH} on one machine, or omit faults.respawn")
    if not dry:
        prepare_default_corpus(config, world, DEFAULT_CORPUS)
    config = micro_batch.with_micro_batch(config, grid)
    plan = run_plan.plan(config, grid)
    run_summary.log_summary(plan, config, everything=dry)
    return plan


def prepare_default_corpus(config: Config, world: MPI.Intracomm, corpus: Mapping[str, Any]) -> None:
    """Prepare shards of the default corpus if data.path has its default value and contains no shards. `corpus`: arguments of
    data_tools.prepare.prepare(). Rank 0 prepares the shards while the other ranks sleep. Collective over world."""
    from mpidp.runtime.world import raise_together

    path = Path(config.data.path)
    if config.data.path != Config().data.path:
        return
    missing = world.bcast(not (path / "index.json").exists() if world.rank == 0 else None, root=0)
    if not missing:
        return
    with raise_together(world):
        if world.rank == 0:
            from data_tools.prepare import prepare

            log.info("no shards in %s: preparing them from the source of Python's standard library", path)
            prepare(**corpus, out=str(path), wait=True)


if __name__ == "__main__":
    run_entry(main)

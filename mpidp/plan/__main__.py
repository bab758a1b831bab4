"""Predicts training time: `python -m mpidp.plan RUN ...`, `plan methods [CONFIG.toml]` and `plan mesh --params 7b --ranks 64`.

`plan RUN` is short for `plan ranks RUN`. docs/plan.md explains the tables.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mpidp.config.command_line import from_args
from mpidp.config.schema import Config
from mpidp.errors import UsageError
from mpidp.metrics.gradient_noise import interval, mean
from mpidp.plan.mesh import command_line
from mpidp.plan.mesh.table import mesh_table
from mpidp.plan.ranks import measured, predict
from mpidp.plan.ranks.table import methods_table, plot, table
from mpidp.runtime.command import Parser, begin, run_entry
from mpidp.runtime.environment import launcher_rank
from mpidp.runtime.options import add_json, add_ranks, program

SAME = ("model.", "train.micro_batch", "train.dtype", "train.device", "optim.name")  # settings on which step times depend


TOPICS = {  # first argument: (one line of help, description)
    "ranks": ("predict how many ranks a run can use efficiently (`plan RUN` is short for `plan ranks RUN`)", """\
Predict training time by batch size and number of ranks. The first RUN supplies the gradient noise scale (train it with
--train.noise_every=10), which determines how much a larger batch helps. This run, and other runs of the same model on other
numbers of ranks, supply the time of a step. docs/plan.md explains the table."""),
    "methods": ("compare training methods on this cluster", """\
Compare training methods for this model on this cluster: predict how much each method sends and how long a step takes. With --run,
train with each method and compare the losses. CONFIG.toml and --section.key=value have the same meaning as for mpidp.train.
docs/plan.md explains the table."""),
    "mesh": ("find the meshes (dp x pp x tp) for a model that is too large for one device", command_line.DESCRIPTION),
}


def main() -> None:
    """Run the command. Collective over COMM_WORLD for `plan methods`, else independent."""
    words = sys.argv[1:]
    if not words or words[0] not in (*TOPICS, "-h", "--help"):
        words = ["ranks", *words]
    if words[0] == "methods":
        (options, settings), world = begin(lambda: read_options(words))
        print_methods(options, from_args(settings), world)
        return
    options, settings = read_options(words)
    if options.topic == "mesh":
        found, show = command_line.plan_from_options(options, settings), mesh_table
    else:
        found, show = plan(options.runs, options.ranks or (), options.loss), table
    if launcher_rank() == 0:
        print(json.dumps(found, allow_nan=False) if options.json else show(found))


def read_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse and check the command line. Return (options, settings), where `settings` are the arguments CONFIG.toml and
    --section.key=value. Raises UsageError if the command line is invalid. Independent."""
    prog = program("mpidp.plan")
    parser = Parser(prog=prog, description="Predict training time.", allow_abbrev=False)
    topics = parser.add_subparsers(dest="topic", required=True, metavar="{ranks,methods,mesh}", prog=prog)
    usages = {
        "ranks": "%(prog)s RUN [RUN ...] [options]",
        "methods": "[mpirun -np N] %(prog)s [CONFIG.toml] [--section.key=value ...] [options]",
        "mesh": "%(prog)s (--params N | --config FILE [--section.key=value ...]) --ranks P [options]",
    }
    of = {name: topics.add_parser(name, help=line, description=text, usage=usages[name], allow_abbrev=name == "ranks",
                                  formatter_class=argparse.RawDescriptionHelpFormatter) for name, (line, text) in TOPICS.items()}
    of["ranks"].add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs; the first is the run to plan")
    add_ranks(of["ranks"], "powers of two, and the ranks of the given runs", several=True)
    of["ranks"].add_argument("--loss", type=float, help="target val_loss, which RUN must have reached (default: the last loss of "
                             "RUN)")
    _add_options_of_methods(of["methods"])
    command_line.add_options(of["mesh"])
    for one in of.values():
        add_json(one)
    options, settings = parser.parse_known_args(list(arguments))
    if options.topic == "ranks" and settings:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    if options.topic == "methods":
        _check_options_of_methods(options, of["methods"])
        from_args(settings)
    return options, settings


def _add_options_of_methods(parser: Parser) -> None:
    add = parser.add_argument
    add("--cluster", default="", metavar="FILE",
        help="cluster.json of mpidp.doctor (default: the one in run.dir, else ./cluster.json)")
    add("--link", default="", metavar="MBIT,MS",
        help="bandwidth of a node in Mbit/s and one-way delay in ms, instead of --cluster")
    add_ranks(parser, "the ranks of this launch; if it has one rank, the number in cluster.json")
    add("--step-seconds", type=float, metavar="S",
        help="compute time of a step in seconds, if all ranks share its micro-batches (default: measured now)")
    add("--run", type=float, nargs="?", const=30.0, metavar="SECONDS",
        help="train with each method on the ranks of this launch, for SECONDS each (default: %(const)g)")
    add("--methods", default="", metavar="A,B",
        help="compare only the method `synchronous` and these methods (default: all methods)")
    add("--plot", default="", metavar="FILE.png", help="with --run: plot the loss against time and bytes (needs matplotlib)")


def _check_options_of_methods(options: argparse.Namespace, parser: Parser) -> None:
    for name, value in (("step-seconds", options.step_seconds), ("run", options.run)):
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name}={value:g} must be more than 0")
    if options.plot and not options.run:
        parser.error("--plot shows the losses of trials, which need --run. Add --run")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib. Install it with `pip install matplotlib`, or use --json instead")


def print_methods(options: argparse.Namespace, config: Config, world: Any) -> None:
    """Predict the bytes sent and the step time of each method. With --run, also measure them in trials. Print the table on rank
    0. Collective over world."""
    from mpidp.plan.methods.trials import TrialOptions, compare_methods

    trial_options = TrialOptions(
        options.ranks or 0, options.cluster, options.link, options.step_seconds or 0.0, options.run or 0.0,
        tuple(filter(None, options.methods.split(","))),
    )
    found = compare_methods(config, trial_options, world)
    if world.rank == 0:
        print(json.dumps(found, allow_nan=False) if options.json else methods_table(found), flush=True)
        if options.plot:
            plot(found, options.plot)


def plan(runs: Sequence[Path], columns: Sequence[int] = (), loss: float | None = None) -> dict[str, Any]:
    """Return the plan as plain values, with times in seconds and sizes in tokens. runs: folders of runs. The plan is for the
    first run, and the others only supply step times. columns: numbers of ranks. If it is empty, _columns() chooses them. loss:
    the target loss. If it is None, the target is the last loss of the first run. Raises UsageError if the runs cannot be
    compared, or if the first run has too few noise measurements. Independent."""
    recorded = [measured.read(run) for run in runs]
    first = recorded[0]
    for other in recorded[1:]:
        differ = sorted(k for k, v in first.config.items() if k.startswith(SAME) and other.config.get(k) != v)
        if differ:
            raise UsageError(f"{other.path} and {first.path} differ in {', '.join(differ)}, so step times are not comparable")
    steps, reached, name = measured.steps_to(first, loss)
    found = _noise(first, steps)
    learned = predict.Learned(steps, first.tokens / first.steps, first.lanes, found["noise_scale_tokens"])
    times = measured.seconds(recorded)
    present = first.starts[-1][0] or 1
    columns = sorted(set(columns)) or _columns(first.lanes.num_lanes, present, [one.ranks for one in times])
    rows = predict.predict(learned, times, columns)
    cells = [cell for row in rows for cell in row.cells]
    if not cells:
        raise UsageError(f"--ranks: each rank needs at least one lane (sequence of micro-batches), and no batch of the table has "
                         f"{columns[0]} lanes or more. Use fewer ranks")
    fastest = min(cells, key=lambda cell: (cell.seconds, cell.ranks))
    cheapest = min(cells, key=lambda cell: (cell.rank_seconds, cell.seconds))
    ends = [predict.predict(replace(learned, noise_scale_tokens=end), times, columns) for end in found["bounds_tokens"] or ()]
    fastest_at_ends = [cell.seconds for end in ends for row in end for cell in row.cells if cell.at == fastest.at]
    best = [cell for p in columns if (cell := predict.best_at(rows, p))]
    return {
        "run": str(first.path), "loss": reached, "loss_name": name, "steps": steps, "tokens_a_step": learned.tokens_a_step,
        "ranks": present, "ranks_not_said": [str(one.path) for one in recorded if any(ranks is None for ranks, _ in one.starts)],
        "noise": found, "fewest_steps": learned.fewest_steps,
        "fewest_tokens": learned.fewest_steps * learned.noise_scale_tokens, "measured": [asdict(one) for one in times],
        "measured_step_seconds": measured.step_seconds(first), "columns": columns,
        "rows": [
            {"multiple": row.multiple, "global_batch": row.lanes.global_batch, "lanes": row.lanes.num_lanes,
             "tokens": row.tokens, "steps": row.steps, "seconds": {str(cell.ranks): cell.seconds for cell in row.cells}}
            for row in rows
        ],
        "fastest": _plain(fastest), "cheapest": _plain(cheapest), "best": [_plain(cell) for cell in best],
        "fastest_bounds_seconds": sorted(fastest_at_ends),
        "worth_ranks": max((cell.ranks for cell in best if cell.rank_seconds <= 2 * cheapest.rank_seconds), default=None),
    }  # fmt: skip


def _plain(cell: predict.Cell) -> dict[str, Any]:
    return {**asdict(cell), "rank_seconds": cell.rank_seconds}


def _noise(run: measured.MeasuredRun, steps: float) -> dict[str, Any]:
    """Return the noise scale, its bounds, and the noise scale of each quarter of the run, in tokens. steps: the step at which the
    run reached the loss. Later steps are not used. The noise scale and its bounds are computed from the second half of the steps
    up to `steps`."""
    if not run.noises:
        one_lane = " and with train.lanes above 1" if run.lanes.num_lanes == 1 else ""
        raise UsageError(f"{run.path} has no measurements of gradient noise. Train with --train.noise_every=10{one_lane}")
    late = [noise for step, noise in run.noises if steps / 2 < step <= steps]
    noise = mean(late)
    if noise is None or not noise.noise_scale_tokens:
        raise UsageError(
            f"{run.path}: the {len(late)} noise measurements in the second half of {steps:g} steps are too few to separate "
            "gradient from noise. Measure more often (set a smaller train.noise_every), or train longer"
        )
    quarters = [mean([n for step, n in run.noises if i < 4 * step / steps <= i + 1]) for i in range(4)]
    return {
        "noise_scale_tokens": noise.noise_scale_tokens, "bounds_tokens": interval(late), "measurements": len(late),
        "quarters_tokens": [quarter.noise_scale_tokens if quarter else None for quarter in quarters],
    }  # fmt: skip


def _columns(lanes: int, present: int, timed: Sequence[int]) -> list[int]:
    """Return the numbers of ranks for the table's columns. These are all measured numbers, and the powers of two up to a limit.
    The limit is four times the largest measured number of ranks, but at least 16. No power of two exceeds the number of
    lanes (sequences of micro-batches) of the largest batch in the table. lanes: the number of lanes of the run's batch. present:
    the number of ranks of the run. timed: the measured numbers of ranks."""
    most = min(int(lanes * predict.MULTIPLES[-1]), max(16, 4 * max(present, *timed)))
    return sorted({present, *timed, *(1 << i for i in range(most.bit_length()))})


if __name__ == "__main__":
    run_entry(main)

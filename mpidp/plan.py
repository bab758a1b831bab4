"""`python -m mpidp.plan RUN [RUN ...] [--ranks 1,2,4] [--loss X] [--json]`: how many ranks a run is worth, predicted from it.
`[mpirun -np N] python -m mpidp.plan methods CONFIG.toml`: which method pays on this cluster (--help after `methods` says more).
`python -m mpidp.plan mesh --params 7b --ranks 64`: which mesh (dp x pp x tp) holds a model that one device does not.

The first RUN says what is learned from a batch (its gradient noise scale, measured with --train.noise_every=10); it and runs of
the same model on other numbers of ranks say what a step costs. docs/plan.md: how to read the table.
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
from mpidp.errors import UsageError
from mpidp.metrics.gradient_noise import interval, mean
from mpidp.planning.mesh import command_line
from mpidp.planning.mesh.table import mesh_table
from mpidp.planning.ranks import measured, predict
from mpidp.planning.ranks.table import methods_table, plot, table
from mpidp.runtime.command import Parser, begin, run_entry
from mpidp.runtime.environment import launcher_rank

SAME = ("model.", "train.micro_batch", "train.dtype", "train.device", "optim.name")  # settings that seconds depend on


METHODS_USAGE = """does another method pay here? For this model on this cluster: what each would send and take, and with
--run what it learns in the same time. CONFIG.toml and --section.key=value as for mpidp.train. docs/plan.md: how to read it."""


def main() -> None:
    """Command line -> table. Collective over COMM_WORLD with `methods`, else independent."""
    if sys.argv[1:2] == ["methods"]:
        which_method(sys.argv[2:])
        return
    if sys.argv[1:2] == ["mesh"]:
        which_mesh(sys.argv[2:])
        return
    parser = Parser(prog="python -m mpidp.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs; the first is the one to plan")
    parser.add_argument("--ranks", help="columns of the table, as 1,2,4; default: powers of two and those measured")
    parser.add_argument("--loss", type=float, help="plan to this val_loss, which RUN reached; default: its last")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    options = parser.parse_args()
    words = [] if options.ranks is None else options.ranks.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        parser.error(f"--ranks={options.ranks}: give whole numbers from 1 up, with commas between them")
    found = plan(options.runs, [int(word) for word in words], options.loss)
    if launcher_rank() == 0:
        print(json.dumps(found, allow_nan=False) if options.json else table(found))


def which_method(words: Sequence[str]) -> None:
    """The command line after `methods` -> table. Collective over COMM_WORLD."""
    parser = Parser(prog="python -m mpidp.plan methods", usage="%(prog)s [CONFIG.toml] [--section.key=value ...] [options]",
                    description=METHODS_USAGE, allow_abbrev=False)
    parser.add_argument("--cluster", default="", metavar="FILE", help="what mpidp.doctor wrote; default: in run.dir, then here")
    parser.add_argument("--link", default="", metavar="MBIT,MS", help="instead: bandwidth of a node, delay one way")
    parser.add_argument("--ranks", type=int, help="default: those of this launch, else those of cluster.json")
    parser.add_argument("--step-seconds", type=float, metavar="S",
                        help="that a rank computes a step, the ranks sharing its lanes; default: measured on the spot")
    parser.add_argument("--run", type=float, nargs="?", const=30.0, metavar="SECONDS",
                        help="really train by each method on the ranks of this launch (default: %(const)g s each)")
    parser.add_argument("--methods", default="", metavar="A,B", help="these alone, and synchronous; default: all")
    parser.add_argument("--plot", default="", metavar="FILE.png", help="with --run: loss against time and bytes (matplotlib)")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")

    def read() -> tuple[argparse.Namespace, Any]:
        options, settings = parser.parse_known_args(words)
        for name, value in (("ranks", options.ranks), ("step-seconds", options.step_seconds), ("run", options.run)):
            if value is not None and not 0 < value < math.inf:
                parser.error(f"--{name}={value:g} must be more than 0")
        if options.plot and not options.run:
            parser.error("--plot draws what was learned: it needs --run")
        if options.plot and importlib.util.find_spec("matplotlib") is None:
            parser.error("--plot needs matplotlib, which is not here: pip install matplotlib, or take --json")
        return options, from_args(settings)

    (options, config), world = begin(read)
    from mpidp.planning.methods.trials import Options, answer

    asked = Options(
        options.ranks or 0, options.cluster, options.link, options.step_seconds or 0.0, options.run or 0.0,
        tuple(filter(None, options.methods.split(","))),
    )
    found = answer(config, asked, world)
    if world.rank == 0:
        print(json.dumps(found, allow_nan=False) if options.json else methods_table(found), flush=True)
        if options.plot:
            plot(found, options.plot)


def which_mesh(words: Sequence[str]) -> None:
    """The command line after `mesh` -> table. Independent."""
    found, as_json = command_line.answer(words)
    if launcher_rank() == 0:
        print(json.dumps(found, allow_nan=False) if as_json else mesh_table(found))


def plan(runs: Sequence[Path], columns: Sequence[int] = (), loss: float | None = None) -> dict[str, Any]:
    """What is printed, as plain values: seconds, tokens. UsageError for runs that cannot be planned from. Independent."""
    facts = [measured.read(run) for run in runs]
    first = facts[0]
    for other in facts[1:]:
        differ = sorted(k for k, v in first.config.items() if k.startswith(SAME) and other.config.get(k) != v)
        if differ:
            raise UsageError(f"{other.path} and {first.path} differ in {', '.join(differ)}: one does not time the other")
    steps, reached, name = measured.steps_to(first, loss)
    found = _noise(first, steps)
    learned = predict.Learned(steps, first.tokens / first.steps, first.lanes, found["noise_scale_tokens"])
    times = measured.seconds(facts)
    present = first.starts[-1][0] or 1
    columns = sorted(set(columns)) or _columns(first.lanes.num_lanes, present, [one.ranks for one in times])
    rows = predict.predict(learned, times, columns)
    cells = [cell for row in rows for cell in row.cells]
    if not cells:
        raise UsageError(f"--ranks: no batch of the table has {columns[0]} lanes, and a rank computes whole lanes")
    fastest = min(cells, key=lambda cell: (cell.seconds, cell.ranks))
    cheapest = min(cells, key=lambda cell: (cell.rank_seconds, cell.seconds))
    ends = [predict.predict(replace(learned, noise_scale_tokens=end), times, columns) for end in found["bounds_tokens"] or ()]
    fastest_at_ends = [cell.seconds for end in ends for row in end for cell in row.cells if cell.at == fastest.at]
    best = [cell for p in columns if (cell := predict.best_at(rows, p))]
    return {
        "run": str(first.path), "loss": reached, "loss_name": name, "steps": steps, "tokens_a_step": learned.tokens_a_step,
        "ranks": present, "ranks_not_said": [str(one.path) for one in facts if any(ranks is None for ranks, _ in one.starts)],
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


def _noise(facts: measured.Facts, steps: float) -> dict[str, Any]:
    """The noise scale on the way to the loss: that of the second half of the steps, and how it moved and scatters."""
    if not facts.noises:
        one_lane = "; a batch of one lane has none (train.lanes)" if facts.lanes.num_lanes == 1 else ""
        raise UsageError(f"{facts.path} has no measurements of gradient noise: train with --train.noise_every=10{one_lane}")
    late = [noise for step, noise in facts.noises if steps / 2 < step <= steps]
    noise = mean(late)
    if noise is None or not noise.noise_scale_tokens:
        raise UsageError(
            f"{facts.path}: {len(late)} noise measurements in the second half of {steps:g} steps do not tell gradient from "
            "noise: measure more often (a smaller train.noise_every) or train longer"
        )
    quarters = [mean([n for step, n in facts.noises if i < 4 * step / steps <= i + 1]) for i in range(4)]
    return {
        "noise_scale_tokens": noise.noise_scale_tokens, "bounds_tokens": interval(late), "measurements": len(late),
        "quarters_tokens": [quarter.noise_scale_tokens if quarter else None for quarter in quarters],
    }  # fmt: skip


def _columns(lanes: int, present: int, timed: Sequence[int]) -> list[int]:
    """Powers of two up to four times what was used (16 at least) and the most lanes of the table, and what was timed."""
    most = min(int(lanes * predict.MULTIPLES[-1]), max(16, 4 * max(present, *timed)))
    return sorted({present, *timed, *(1 << i for i in range(most.bit_length()))})


if __name__ == "__main__":
    run_entry(main)

"""`python -m mpidp.plan RUN [RUN ...] [--ranks 1,2,4] [--loss X] [--json]`: how many ranks a run is worth, predicted from it.

The first RUN says what is learned from a batch (its gradient noise scale, measured with --train.noise_every=10); it and runs of
the same model on other numbers of ranks say what a step costs. docs/plan.md: how to read the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mpidp import measured, predict
from mpidp.entry import Parser, launcher_rank, run_entry
from mpidp.errors import UsageError
from mpidp.noise import interval, mean
from mpidp.plan_table import table

SAME = ("model.", "train.micro_batch", "train.dtype", "train.device", "optim.name")  # settings that seconds depend on


def main() -> None:
    """Command line -> table."""
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

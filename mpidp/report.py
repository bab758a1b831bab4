"""`python -m mpidp.report RUN [RUN ...] [--out report.html] [--png DIR]`: what runs did, and where their time and energy went.

One file that needs no network and no script: losses, speed, the waterfall from ideal to measured, ranks, energy, events; several
runs are compared. docs/report.md: how to read it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from html import escape
from pathlib import Path

from mpidp.errors import UsageError
from mpidp.reporting.compare import compare
from mpidp.reporting.costs import costs
from mpidp.reporting.page import page
from mpidp.reporting.read import Run, read
from mpidp.reporting.sections import of_run
from mpidp.reporting.waterfall import waterfall
from mpidp.runtime.command import Parser, run_entry
from mpidp.runtime.environment import launcher_rank
from mpidp.runtime.files import write_file


def main() -> None:
    """Command line -> report. Independent."""
    parser = Parser(prog="python -m mpidp.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--png", type=Path, metavar="DIR", help="the charts as pictures, too (pip install 'mpidp[report]')")
    parser.add_argument(
        "--grams-per-kwh", type=float, default=0.0, help="CO2e of the electricity; default: energy.grams_per_kwh of the run"
    )
    parser.add_argument("--price-per-node-hour", type=float, default=0.0, help="default: energy.price_per_node_hour of the run")
    options = parser.parse_args()
    if min(options.grams_per_kwh, options.price_per_node_hour) < 0:
        parser.error("--grams-per-kwh and --price-per-node-hour must not be negative")
    if options.png is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--png needs matplotlib, which is not here: pip install 'mpidp[report]' (or matplotlib itself)")
    runs = named([read(path) for path in options.runs])
    if launcher_rank():
        return
    write(options.out, report(runs, options.grams_per_kwh, options.price_per_node_hour))
    print(f"{options.out}: {', '.join(run.name for run in runs)}")
    if options.png is not None:
        from mpidp.reporting.pictures import draw

        for path in draw(runs, options.png):
            print(path)


def named(runs: Sequence[Run]) -> list[Run]:
    """Runs whose folders have the same name are told apart by their paths. Pure."""
    names = [run.name for run in runs]
    paths = [str(run.path) for run in runs]
    if len(set(paths)) < len(paths):
        raise UsageError(f"a run is given twice: {', '.join(sorted({path for path in paths if paths.count(path) > 1}))}")
    return [replace(run, name=str(run.path) if names.count(run.name) > 1 else run.name) for run in runs]


def report(runs: Sequence[Run], grams_per_kwh: float = 0.0, price_per_node_hour: float = 0.0) -> str:
    """The page; factors of 0: those of the runs. Pure, but for the date."""
    falls = {run.name: waterfall(run) for run in runs}
    spent = {
        run.name: costs(run, grams_per_kwh or float(run.config.get("energy.grams_per_kwh", 0.0)),
                        price_per_node_hour or float(run.config.get("energy.price_per_node_hour", 0.0)))
        for run in runs
    }
    sections = [of_run(run, falls[run.name], spent[run.name]) for run in runs]
    if len(runs) > 1:
        inner = [f"<h1 class='next'>Run {escape(run.name)}</h1>{said}" for run, said in zip(runs, sections, strict=True)]
        sections = [compare(runs, falls, spent), *inner]
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    return page(
        title,
        f"mpidp report, {datetime.now():%Y-%m-%d %H:%M}. Made from metrics.jsonl alone; seconds and bytes are rank 0's unless "
        "it is said otherwise.",
        sections,
    )


def write(path: Path, content: str) -> None:
    """UsageError where it cannot be written. Independent."""
    try:
        write_file(path, content.encode())
    except OSError as error:
        raise UsageError(f"--out={path} cannot be written ({error}): make its folder, or choose another") from error


if __name__ == "__main__":
    sys.exit(run_entry(main))

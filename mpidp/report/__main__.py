"""`python -m mpidp.report RUN [RUN ...] [--out report.html] [--png DIR]` reports what runs did, and where their time and energy
went.

The command writes one HTML file without scripts or network access. The file shows loss, throughput, the waterfall from ideal to
measured speed, ranks, energy and events, and compares several runs. docs/report.md explains how to read the report.
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
from mpidp.report.compare import compare
from mpidp.report.costs import costs
from mpidp.report.page import page
from mpidp.report.read import RecordedRun, read
from mpidp.report.sections import of_run
from mpidp.report.waterfall import waterfall
from mpidp.runtime.command import Parser, run_entry
from mpidp.runtime.environment import launcher_rank
from mpidp.runtime.files import write_file
from mpidp.runtime.options import add_out, program

DESCRIPTION = """\
Report what runs did, and where their time and energy went. Writes one HTML file without scripts or network access. Several
runs are compared. docs/report.md explains how to read the report."""


def main() -> None:
    """Read the runs and write the report. Independent."""
    parser = Parser(prog=program("mpidp.report"), usage="%(prog)s RUN [RUN ...] [options]", description=DESCRIPTION,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs (run.dir)")
    add_out(parser, "the HTML file to write (default: %(default)s)", metavar="FILE", default="report.html")
    parser.add_argument("--png", type=Path, metavar="DIR", help="also write charts as PNG (needs pip install 'mpidp[report]')")
    parser.add_argument(
        "--grams-per-kwh", type=float, default=0.0, metavar="G",
        help="CO2e of the electricity in g/kWh (default: energy.grams_per_kwh of each run)",
    )
    parser.add_argument("--price-per-node-hour", type=float, default=0.0, metavar="PRICE",
                        help="price of a node-hour (default: energy.price_per_node_hour of each run)")
    options = parser.parse_args()
    if min(options.grams_per_kwh, options.price_per_node_hour) < 0:
        parser.error("--grams-per-kwh and --price-per-node-hour must not be negative")
    if options.png is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--png needs matplotlib. Install it with `pip install 'mpidp[report]'`")
    runs = named([read(path) for path in options.runs])
    if launcher_rank():
        return
    write(Path(options.out), report(runs, options.grams_per_kwh, options.price_per_node_hour))
    print(f"{options.out}: {', '.join(run.name for run in runs)}")
    if options.png is not None:
        from mpidp.report.pictures import draw

        for path in draw(runs, options.png):
            print(path)


def named(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """Return the runs with unique names. If several folders have the same name, their paths become the names. Raises UsageError
    if a run is given twice. Pure."""
    names = [run.name for run in runs]
    paths = [str(run.path) for run in runs]
    if len(set(paths)) < len(paths):
        raise UsageError(f"a run is given twice: {', '.join(sorted({path for path in paths if paths.count(path) > 1}))}")
    return [replace(run, name=str(run.path) if names.count(run.name) > 1 else run.name) for run in runs]


def report(runs: Sequence[RecordedRun], grams_per_kwh: float = 0.0, price_per_node_hour: float = 0.0) -> str:
    """Return the HTML page. If grams_per_kwh or price_per_node_hour is 0, the value in the configuration of each run is used. The
    page contains the current time. Independent."""
    falls = {run.name: waterfall(run) for run in runs}
    spent = {
        run.name: costs(run, grams_per_kwh or float(run.config.get("energy.grams_per_kwh", 0.0)),
                        price_per_node_hour or float(run.config.get("energy.price_per_node_hour", 0.0)))
        for run in runs
    }
    sections = [of_run(run, falls[run.name], spent[run.name]) for run in runs]
    if len(runs) > 1:
        inner = [f"<h1 class='next'>Run {escape(run.name)}</h1>{html}" for run, html in zip(runs, sections, strict=True)]
        sections = [compare(runs, falls, spent), *inner]
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    return page(
        title,
        f"mpidp report, {datetime.now():%Y-%m-%d %H:%M}, made from metrics.jsonl. Seconds and bytes are those of rank 0 unless "
        "stated otherwise.",
        sections,
    )


def write(path: Path, content: str) -> None:
    """Write `content` to the file `path`. Raises UsageError if the file cannot be written. Independent."""
    try:
        write_file(path, content.encode())
    except OSError as error:
        raise UsageError(f"--out={path} cannot be written ({error}). Create its folder, or choose another file") from error


if __name__ == "__main__":
    sys.exit(run_entry(main))

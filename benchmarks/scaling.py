"""Measures the phases of a step on several numbers of ranks, in complete training runs, as medians over the steps after the
warm-up.

    python benchmarks/scaling.py --ranks 1,2,4 --repeats 3 --plot scaling.html -- --model.model_dim=256 --train.steps=30 ...

By default this is strong scaling, with the same global batch for all runs. With --weak the batch is proportional to the number of
ranks. The program prints a table, the efficiency, and whether runs with the same batch end with the same weights. --json prints
JSON lines, and --plot makes a plot. Compare only times that were measured within one call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from mpidp.config.schema import Config
from mpidp.report.compare import scaling_of, scaling_section
from mpidp.report.page import page
from mpidp.report.pictures import draw_scaling

PHASES = ("step", "data", "compute", "comm_wait", "update")


def measure(ranks: int, launcher: str, settings: list[str], skip: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [*launcher.split(), str(ranks), sys.executable, "-m", "mpidp.train", f"--run.dir={run_dir}",
                   "--train.eval_every=0", "--train.eval_tokens=4096", "--train.save_every=0", *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        batch = tomllib.loads((run_dir / "config.toml").read_text())["train"]["global_batch"]
    steps = [line for line in lines if "train_loss" in line][skip:]
    row = {f"{phase}_seconds": statistics.median(line[f"{phase}_seconds"] for line in steps) for phase in PHASES}
    tokens = steps[-1]["tokens"] / steps[-1]["step"]  # not a difference of two lines, because `tokens` may grow only at meetings
    mfu = [line["mfu"] for line in steps if line.get("mfu") is not None]
    return {
        "ranks": ranks, "batch": batch, **row, "tokens_per_second": tokens / row["step_seconds"],
        "comm_bytes": steps[-1]["comm_bytes"], "mfu": statistics.median(mfu) if mfu else None,
        "weights_sha256": lines[-1]["weights_sha256"],
    }


def settings_of(options: argparse.Namespace, ranks: int, fewest: int) -> list[str]:
    """Return the given settings. For weak scaling, the global batch is proportional to the number of ranks."""
    if not options.weak:
        return options.settings
    given = [word.partition("=")[2] for word in options.settings if word.startswith("--train.global_batch=")]
    batch = int(given[-1]) if given else Config().train.global_batch
    return [*options.settings, f"--train.global_batch={batch * ranks // fewest}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, measured in turn in every repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", type=int, default=5, help="number of first steps to ignore")
    parser.add_argument("--launcher", default="mpirun -np")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--weak", action="store_true", help="weak scaling: train.global_batch is for the fewest ranks")
    parser.add_argument("--plot", type=Path, metavar="FILE.html|FILE.png")
    parser.add_argument("settings", nargs="*", help="settings of mpidp.train, after --")
    options = parser.parse_args()
    if options.plot and options.plot.suffix not in (".html", ".png"):
        parser.error(f"--plot {options.plot}: the file name must end in .html or .png")
    sizes = [int(n) for n in options.ranks.split(",")]
    rows: dict[int, list[dict]] = {n: [] for n in sizes}
    for _ in range(options.repeats):
        for n in sizes:
            rows[n].append(measure(n, options.launcher, settings_of(options, n, min(sizes)), options.skip))
    heads = " ".join(f"{phase + ' ms':>12}" for phase in PHASES)
    print(f"{'ranks':>5} {heads} {'tokens/s':>12} {'MB sent':>9} {'mfu':>6}")
    for n, runs in rows.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key.endswith("_seconds")}
        speed = statistics.median(run["tokens_per_second"] for run in runs)
        mfu = runs[0]["mfu"]
        print(f"{n:>5} " + " ".join(f"{1e3 * middle[p + '_seconds']:>12.2f}" for p in PHASES)
              + f" {speed:>12,.0f} {runs[0]['comm_bytes'] / 1e6:>9.2f} " + (f"{100 * mfu:>5.1f}%" if mfu else "     -"))
        if options.json:
            print(json.dumps({"ranks": n, **middle, "tokens_per_second": speed}))
    found = scaling_of([(n, run["batch"], run["tokens_per_second"]) for n, runs in rows.items() for run in runs])
    print(found.why)
    for row in found.rows:
        if row.efficiency is not None:
            print(f"{row.ranks:>5} ranks: {100 * row.efficiency:.1f}% {found.kind} efficiency")
    if options.plot and options.plot.suffix == ".png":
        draw_scaling(found, options.plot)
    elif options.plot:
        words = " ".join([f"{options.repeats} runs each", *options.settings])
        options.plot.write_text(page("Scaling", words, [scaling_section(found)]))
    for batch in sorted({run["batch"] for runs in rows.values() for run in runs}):
        hashes = [run["weights_sha256"] for runs in rows.values() for run in runs if run["batch"] == batch]
        same = f"equal in all {len(hashes)} runs, {hashes[0][:16]}"
        print(f"weights with global batch {batch}: {same if len(set(hashes)) == 1 else f'{len(set(hashes))} different hashes'}")


if __name__ == "__main__":
    main()

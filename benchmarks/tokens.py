"""Compares all methods for the same number of tokens. Shows how much the loss increases if ranks send less or wait less, on any
network.

    python benchmarks/tokens.py --text tinyshakespeare.txt                                  # all methods, 400 steps, one seed
    python benchmarks/tokens.py --methods local,local+topk --seeds 3 --json tokens.json -- --optim.lr=2e-3
    python benchmarks/tokens.py --methods topk --try "--comm.ratio_warmup=50" --try "--comm.momentum=0.9"

The model, the methods and their settings are those of network.py. Ranks run under a plain mpirun and send messages, as between
nodes. Every method starts from the same weights, trains on the same batches, and is compared with `synchronous` of the same seed.
The table has the held-out loss in nats per token, and its increase in per cent. Losses are interpolated linearly between
evaluations. `local` is evaluated at its meetings. Bytes are those that rank 0 sends. They are also shown as a fraction 1/n of the
bytes of `synchronous`. With several seeds, medians and half the range are printed. Losses do not depend on the load of the
machine, and repeat bit for bit on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from network import METHODS, SETTING, SHORT, Watch, at, middle, rejection

from data_tools.prepare import prepare

ROOT = Path(__file__).resolve().parent.parent
BASE = "synchronous"
NAMES = [name for name in METHODS if not name.startswith("server")]  # a server rank computes no gradients
LIMIT = 3600.0  # s, time limit of a run


def train(name: str, seed: int, settings: list[str], folder: Path, ranks: int) -> dict[str, Any]:
    """Run one method. Return its losses by tokens and its bytes per step, or the error message if it failed."""
    run_dir = folder / f"{name}-{seed}"
    command = ["mpirun", "-n", str(ranks), sys.executable, "-m", "mpidp.train", *settings, f"--train.seed={seed}",
               f"--run.dir={run_dir}", "--run.resume=never"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=LIMIT)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "rror" in line or line.startswith("mpidp: ")] or ["no output"]
        return {"problem": f"failed, ended with {done.returncode}: {errors[0].strip()[:200]}"}
    watch = Watch(run_dir / "metrics.jsonl")
    watch.poll()
    sent = sum(line["comm_bytes"] for line in watch.steps) / watch.steps[-1]["step"]
    return {"curve": [(tokens, loss) for _, tokens, loss in watch.curve], "bytes": sent, "seconds": watch.seconds}


def loss_at(run: dict[str, Any], tokens: int) -> float:
    """Return the loss after `tokens` tokens. Before the first and after the last evaluation, return NaN."""
    curve = [(0.0, *point) for point in run["curve"]]
    return at(curve, 1, tokens) if curve[0][1] <= tokens <= curve[-1][1] else float("nan")


def table(found: dict[str, list[dict[str, Any]]], marks: list[int]) -> None:
    """Print the results as a table."""
    print(f"\n| method | {' | '.join(f'loss at {mark:,} tokens' for mark in marks)} | at the end, % more | bytes a step | "
          f"relative to {BASE} | s of steps |\n|{'---|' * (len(marks) + 5)}")
    base = found[BASE]
    for name, runs in found.items():
        if problem := next((run["problem"] for run in runs if "problem" in run), ""):
            print(f"| {name} | {problem} |" + " |" * (len(marks) + 3))
            continue
        more = [100 * (loss_at(run, marks[-1]) / loss_at(other, marks[-1]) - 1) for run, other in zip(runs, base, strict=False)]
        cells = [middle([loss_at(run, mark) for run in runs], 3) for mark in marks] + [
            middle(more, 2), f"{runs[0]['bytes']:,.0f}", f"1/{base[0]['bytes'] / max(1, runs[0]['bytes']):,.0f}",
            middle([run["seconds"] for run in runs], 0),
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, default=Path("tinyshakespeare.txt"), help="a file or folder; the last tenth is held out")
    add("--tokenizer", default="char", help="as for data_tools.prepare")
    add("--methods", help=f"any of {', '.join(NAMES)} (default: all); {BASE} always runs")
    add("--try", dest="tries", action="append", default=[], metavar="SETTINGS", help="also run each method with these settings")
    add("--ranks", type=int, default=2)
    add("--steps", type=int, default=400, help="(%(default)s)")
    add("--marks", type=int, default=4, help="number of evaluations shown in the table, evenly spaced (%(default)s)")
    add("--seeds", type=int, default=1, help="runs of each method (%(default)s)")
    add("--first-seed", type=int, default=1, help="(%(default)s)")
    add("--short", action="store_true", help="only test that it runs: a tiny model, three methods, 8 steps")
    add("--json", type=Path, help="write all results as JSON")
    add("settings", nargs="*", help="more settings of mpidp.train for all methods, after --")
    options = parser.parse_args()
    names = options.methods.split(",") if options.methods else NAMES
    if options.short:
        options.steps, options.marks, names = 8, 2, ["int8", "local"]
        options.settings = [*SHORT, "--optim.warmup_steps=2", *options.settings]
    if wrong := [name for name in names if name not in METHODS]:
        parser.error(f"--methods: unknown: {', '.join(wrong)}; choose from {', '.join(NAMES)}")
    if options.steps < options.marks or options.marks < 1:
        parser.error(f"--marks {options.marks} must be at least 1 and at most --steps {options.steps}")
    options.methods = {BASE: METHODS[BASE]} | {name: METHODS[name] for name in names}
    for settings in options.tries:
        options.methods |= {f"{name} {settings}": [*METHODS[name], *settings.split()] for name in names}
    if options.short:
        options.methods["local"] = ["--strategy.name=local", "--strategy.sync_every=4"]
    return options


def main() -> None:
    options = read_options()
    if not options.text.exists():
        print(f"skipped: {options.text} does not exist; give --text FILE, for example the tinyshakespeare text of char-rnn")
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.methods}
    with tempfile.TemporaryDirectory() as folder:
        prepare(str(options.text), options.tokenizer, Path(folder) / "shards", shards=1, val_fraction=0.1, verbose=False)
        common = [*SETTING, "--comm.transport=messages", "--train.eval_tokens=32768", f"--data.path={folder}/shards",
                  f"--train.steps={options.steps}", f"--train.eval_every={options.steps // options.marks}", *options.settings]
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for i, (name, settings) in enumerate(options.methods.items()):
                given = [*common, *settings]
                problem = rejection(given)
                found[name].append(run := {"problem": problem} if problem else train(
                    f"run{i}", seed, given, Path(folder), options.ranks))
                result = run.get("problem") or " ".join(f"{loss:.4f}" for _, loss in run["curve"])
                print(f"seed {seed}  {name}: {result}", flush=True)
        if "problem" not in found[BASE][0]:
            end = found[BASE][0]["curve"][-1][0]
            table(found, [round(end * (i + 1) / options.marks) for i in range(options.marks)])
    if options.json:
        setting = {key: str(value) for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": setting, "found": found}, indent=1))


if __name__ == "__main__":
    main()

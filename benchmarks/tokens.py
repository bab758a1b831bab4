"""Every method for the same tokens: what it costs in loss to send less or to wait less, whatever the network is.

    python benchmarks/tokens.py --text tinyshakespeare.txt                                  # all methods, 400 steps, one seed
    python benchmarks/tokens.py --methods local,local+topk --seeds 3 --json tokens.json -- --optim.lr=2e-3
    python benchmarks/tokens.py --methods topk --try "--comm.ratio_warmup=50" --try "--comm.momentum=0.9"

The model, the methods and their settings are network.py's; ranks run under a plain mpirun and send messages, as between nodes.
Every method starts from the same weights, sees the same batches, and is compared with `synchronous` of the same seed: held-out
loss in nats a token, and by how many per cent it is more. A loss between two evaluations is read off a straight line; `local` is
evaluated where its ranks meet. Bytes are what rank 0 sent, and 1/n of what it sent for `synchronous`. With more seeds than one:
medians, and half the range. Losses do not depend on how busy the machine is, and repeat to the bit on one machine.
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

from network import METHODS, SETTING, SHORT, Watch, at, middle, refused

from data_tools.prepare import prepare

ROOT = Path(__file__).resolve().parent.parent
BASE = "synchronous"
NAMES = [name for name in METHODS if not name.startswith("server")]  # a server is a rank that computes nothing
LIMIT = 3600.0  # s, of a run


def train(name: str, seed: int, settings: list[str], folder: Path, ranks: int) -> dict[str, Any]:
    """A whole run: its losses by tokens, and its bytes a step. Or its problem."""
    run_dir = folder / f"{name}-{seed}"
    command = ["mpirun", "-n", str(ranks), sys.executable, "-m", "mpidp.train", *settings, f"--train.seed={seed}",
               f"--run.dir={run_dir}", "--run.resume=never"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=LIMIT)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "rror" in line or line.startswith("mpidp: ")] or ["it said nothing"]
        return {"problem": f"failed, ended with {done.returncode}: {told[0].strip()[:200]}"}
    watch = Watch(run_dir / "metrics.jsonl")
    watch.look()
    sent = sum(line["comm_bytes"] for line in watch.steps) / watch.steps[-1]["step"]
    return {"curve": [(tokens, loss) for _, tokens, loss in watch.curve], "bytes": sent, "seconds": watch.seconds}


def loss_at(run: dict[str, Any], tokens: int) -> float:
    """nan before its first evaluation."""
    curve = [(0.0, *point) for point in run["curve"]]
    return at(curve, 1, tokens) if curve[0][1] <= tokens <= curve[-1][1] else float("nan")


def table(found: dict[str, list[dict[str, Any]]], marks: list[int]) -> None:
    """Of the runs there are."""
    print(f"\n| method | {' | '.join(f'loss at {mark:,} tokens' for mark in marks)} | at the end, % more | bytes a step | "
          f"of synchronous' | s of steps |\n|{'---|' * (len(marks) + 5)}")
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
    add("--text", type=Path, default=Path("tinyshakespeare.txt"), help="a file or a folder; its last tenth is held out")
    add("--tokenizer", default="char", help="as of data_tools.prepare")
    add("--methods", help=f"of {', '.join(NAMES)} (all); {BASE} always runs")
    add("--try", dest="tries", action="append", default=[], metavar="SETTINGS", help="each method once more, with these as well")
    add("--ranks", type=int, default=2)
    add("--steps", type=int, default=400, help="(%(default)s)")
    add("--marks", type=int, default=4, help="evaluations that the table shows, evenly over the run (%(default)s)")
    add("--seeds", type=int, default=1, help="runs of each method (%(default)s)")
    add("--first-seed", type=int, default=1, help="(%(default)s)")
    add("--short", action="store_true", help="that it runs: a tiny model, three methods, 8 steps")
    add("--json", type=Path, help="all that was found")
    add("settings", nargs="*", help="more settings of mpidp.train, for all methods, after --")
    options = parser.parse_args()
    names = options.methods.split(",") if options.methods else NAMES
    if options.short:
        options.steps, options.marks, names = 8, 2, ["int8", "local"]
        options.settings = [*SHORT, "--optim.warmup_steps=2", *options.settings]
    if wrong := [name for name in names if name not in METHODS]:
        parser.error(f"--methods: {', '.join(wrong)}: there is {', '.join(NAMES)}")
    if options.steps < options.marks or options.marks < 1:
        parser.error(f"--steps {options.steps} has no room for --marks {options.marks}")
    options.methods = {BASE: METHODS[BASE]} | {name: METHODS[name] for name in names}
    for settings in options.tries:
        options.methods |= {f"{name} {settings}": [*METHODS[name], *settings.split()] for name in names}
    if options.short:
        options.methods["local"] = ["--strategy.name=local", "--strategy.sync_every=4"]
    return options


def main() -> None:
    options = read_options()
    if not options.text.exists():
        print(f"skipped: there is no {options.text}; give --text FILE, for example the tinyshakespeare text of char-rnn")
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.methods}
    with tempfile.TemporaryDirectory() as folder:
        prepare(str(options.text), options.tokenizer, Path(folder) / "shards", shards=1, val_fraction=0.1, say=False)
        common = [*SETTING, "--comm.transport=messages", "--train.eval_tokens=32768", f"--data.path={folder}/shards",
                  f"--train.steps={options.steps}", f"--train.eval_every={options.steps // options.marks}", *options.settings]
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for i, (name, settings) in enumerate(options.methods.items()):
                given = [*common, *settings]
                problem = refused(given)
                found[name].append(run := {"problem": problem} if problem else train(
                    f"run{i}", seed, given, Path(folder), options.ranks))
                words = run.get("problem") or " ".join(f"{loss:.4f}" for _, loss in run["curve"])
                print(f"seed {seed}  {name}: {words}", flush=True)
        if "problem" not in found[BASE][0]:
            end = found[BASE][0]["curve"][-1][0]
            table(found, [round(end * (i + 1) / options.marks) for i in range(options.marks)])
    if options.json:
        setting = {key: str(value) for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": setting, "found": found}, indent=1))


if __name__ == "__main__":
    main()

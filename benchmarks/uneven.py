"""Compares the settings of train.balance when one rank runs at half speed, and checks that all give the same bits.

    python benchmarks/uneven.py [--ranks 2] [--lanes 12] [--slow delay|core|none] [--repeats 3] [-- settings of mpidp.train]

With `delay`, rank 1 sleeps as long as it computes. With `core`, each rank is bound to a core, and another process computes on the
core of rank 1 during the whole run. The program makes complete training runs. It prints the median time of a step after the
warm-up. During the warm-up, `measured` distributes the lanes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from data_tools.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]
BURN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
# The core is chosen by the launcher's rank; the binding of both MPIs is off.
PINNED = """
import os, runpy, sys
rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cores[rank % len(cores)]})
sys.argv[0] = "mpidp.train"
runpy.run_module("mpidp.train", run_name="__main__")
"""


def run(folder: Path, balance: str, options: argparse.Namespace, number: int) -> tuple[float, str, int]:
    run_dir = folder / f"{balance}_{number}"
    command = [
        *options.launcher.split(), str(options.ranks), sys.executable, "-c", PINNED, f"--data.path={folder / 'shards'}",
        f"--run.dir={run_dir}", f"--train.balance={balance}", f"--train.global_batch={options.lanes}", "--train.micro_batch=1",
        "--train.steps=30", "--train.threads=1", "--train.eval_every=0", "--train.eval_tokens=4096", "--train.save_every=0",
        *options.settings,
    ]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    if options.slow == "delay":
        environment["MPIDP_FAULT"] = "delay:1:1,factor=2"
    burner = None
    if options.slow == "core":
        burner = subprocess.Popen([sys.executable, "-c", BURN, str(sorted(os.sched_getaffinity(0))[1])])
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    finally:
        if burner is not None:
            burner.kill()
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step_seconds"] for line in lines if "train_loss" in line][17:]
    slowest = statistics.mode(line["slowest_rank"] for line in lines if "train_loss" in line)
    return statistics.median(steps), lines[-1]["weights_sha256"], slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lanes", type=int, default=12)
    parser.add_argument("--slow", default="delay", choices=("delay", "core", "none"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--launcher", default="mpirun -np")
    parser.add_argument("settings", nargs="*", help="settings of mpidp.train, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("".join(p.read_text() for p in sorted((ROOT / "mpidp").rglob("*.py"))))
        prepare(str(folder / "text.txt"), "byte", folder / "shards", shards=1, val_fraction=0.1, verbose=False)
        found: dict[str, list[float]] = {balance: [] for balance in ("even", "measured", "steal")}
        hashes = set()
        for number in range(options.repeats):
            for balance, times in found.items():
                seconds, sha256, slowest = run(folder, balance, options, number)
                times.append(seconds)
                hashes.add(sha256)
                if balance == "even":
                    print(f"even: the slowest rank is {slowest}, {1e3 * seconds:.1f} ms per step", flush=True)
    print(f"{options.ranks} ranks, {options.lanes} lanes, slow: {options.slow}; medians of {options.repeats} runs")
    for balance, times in found.items():
        ratio = statistics.median(a / b for a, b in zip(found["even"], times, strict=True))
        print(f"{balance:<10} {1e3 * statistics.median(times):>8.1f} ms per step   {ratio:.2f} times as fast as even")
    print("weights: " + ("equal in all runs" if len(hashes) == 1 else f"{len(hashes)} different hashes"))


if __name__ == "__main__":
    main()

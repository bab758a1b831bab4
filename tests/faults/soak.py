"""Kill ranks every few seconds; the weights must equal those of a run without failures. Prints the goodput: seconds of kept steps
divided by seconds from the first command to the end.

    python -m tests.faults.soak [--short] [--ranks 8] [--kills 6] [--every 30] [--seed 1] [--way ulfm|restart]
                                [--mesh tp|pp]

ulfm: one Open MPI job, whose remaining ranks continue. restart: MPICH's job ends when a rank fails, and mpirun is started again
from the last checkpoint. The seed determines which rank is killed and when; a kill may hit a rank that is just starting. If the
machine trains faster than when the steps were counted, kills come earlier: each after its share of the steps. --mesh: replicas of
two ranks, with mesh.tp=2 or mesh.pp=2.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults.commands import Shell, Started

MPI = {"ulfm": "openmpi", "restart": "mpich"}
ULFM = ["--with-ft", "ulfm", "--mca", "coll", "^han,adapt"]
AIMS = {"ulfm": 0.9, "restart": 0.7}
CONFIG = """
[data]
path = "shards"
[model]
num_layers = 2
model_dim = 128
seq_len = 64
[train]
device = "cpu"
threads = 1
global_batch = 64
micro_batch = 2
lanes = 16
eval_every = 0
eval_tokens = 4096
save_every = 10
[run]
tries = 99
"""


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl."""
    text = (run / "metrics.jsonl").read_bytes() if (run / "metrics.jsonl").exists() else b""
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


def ended(run: Path) -> dict[str, Any] | None:
    found = lines(run)
    return found[-1] if found and found[-1].get("event") == "end" else None


def start(shell: Shell, ranks: int, run: str, steps: int, mesh: str, ulfm: bool = False) -> Started:
    train = ["python", "-m", "mpidp.train", "soak.toml", f"--run.dir={run}", f"--train.steps={steps}"]
    train += [f"--mesh.{mesh}=2"] if mesh else []
    return shell.start_command(["mpirun", *(ULFM if ulfm else []), "-n", str(ranks), *train])


def without_faults(shell: Shell, ranks: int, seconds: float, mesh: str) -> tuple[int, str]:
    """Return (number of steps that take about `seconds` on so many ranks, hash of their weights)."""
    start(shell, ranks, "probe", 12, mesh).wait(300)
    step = statistics.median(line["step_seconds"] for line in lines(shell.folder / "probe") if "train_loss" in line)
    steps = max(20, int(seconds / step))
    start(shell, 2, "whole", steps, mesh).wait(60 + 4 * seconds)
    end = ended(shell.folder / "whole")
    assert end is not None, "the run without faults did not end"
    return steps, str(end["weights_sha256"])


def soak(shell: Shell, way: str, options: argparse.Namespace, steps: int, right: str) -> bool:
    """Train with kills. Print the result, and return whether the weights are correct."""
    chance, run = random.Random(options.seed), shell.folder / way
    began, starts, killed = time.monotonic(), 1, 0
    job = start(shell, options.ranks, way, steps, options.mesh, way == "ulfm")
    due = 0.0  # time of the next kill; the first is counted from the first step
    while time.monotonic() - began < 600 + 5 * options.every * options.kills:
        time.sleep(0.02)
        if job.process.poll() is not None:
            if ended(run) or way == "ulfm":
                break
            starts += 1
            job = start(shell, options.ranks, way, steps, options.mesh)
        done = max((line["step"] for line in lines(run) if "train_loss" in line), default=0)
        if not due and done:
            due = time.monotonic() + options.every
        hurry = done >= steps * (killed + 1) / (options.kills + 1)
        alive = job.ranks() if due and killed < options.kills and (hurry or time.monotonic() > due) else []
        if len(alive) > (2 if options.mesh else 1):
            victim = chance.randrange(len(alive))
            with suppress(ProcessLookupError):
                os.kill(alive[victim], signal.SIGKILL)
            killed, due = killed + 1, time.monotonic() + options.every * chance.uniform(0.7, 1.3)
    wall = time.monotonic() - began
    end, seconds = ended(run), sum(line["step_seconds"] for line in lines(run) if "train_loss" in line)
    if end is None or killed < options.kills:
        what = "did not end" if end is None else f"ended after {killed} kills"
        print(f"{way}: it {what}\n{job.so_far(job.process.poll() or 0)}")
        return False
    went_on, after = f"{starts} starts", [line["seconds"] for line in lines(run) if line.get("event") == "recovered"]
    if after:
        went_on = f"went on {len(after)} times, {statistics.median(after):.2f} s after a death"
    same = end["weights_sha256"] == right
    print(f"{way}: {options.ranks} ranks, {killed} kills {options.every:g} s apart, {steps} steps: {went_on}; goodput "
          f"{seconds / wall:.3f} (aim {AIMS[way]}) of {wall:.0f} s; weights {'as without' if same else 'DIFFER'}", flush=True)
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="4 ranks, 2 kills, 3 s apart")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between kills, on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--way", choices=MPI, action="append", help="default: both")
    parser.add_argument("--mesh", choices=["tp", "pp"], default="", help="default: no mesh")
    options = parser.parse_args()
    if options.short:
        options.ranks, options.kills, options.every = 4, 2, 3.0
    with tempfile.TemporaryDirectory() as name:
        shells = {way: Shell(Path(name), MPI[way]) for way in options.way or MPI}
        first = next(iter(shells.values()))
        (first.folder / "soak.toml").write_text(CONFIG)
        text = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py")))
        (first.folder / "text.txt").write_text(text)
        first.run("-m", "data_tools.prepare", "--source", "text.txt", "--out", "shards", "--tokenizer", "byte")
        steps, whole = without_faults(first, options.ranks, options.every * (options.kills + 0.5), options.mesh)
        right = [soak(shell, way, options, steps, whole) for way, shell in shells.items()]
    sys.exit(not all(right))


if __name__ == "__main__":
    main()

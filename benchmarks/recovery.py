"""Measures the cost of a failed rank: the time until the first surviving rank detects the failure, and until the first step
without the rank.

    python benchmarks/recovery.py [--ranks 4] [--phase reduce,after=0.01] [--repeats 5] [-- SETTINGS of mpidp.train]

The program needs Open MPI with `mpirun --with-ft ulfm`. The model has 16 M parameters (64 MB of gradients) and short sequences,
so that a step is mostly communication. Rank 1 kills itself in step 6. Each repeat is a new mpirun. Medians and maxima are
printed. `step` is the median time of the steps before the failure. `step after` is the median time of the steps after the
failure, with one rank less. The time of a recovery includes one such step.

A failure is detected after the kernel has freed the process's memory, which took 5 to 20 ms for 100 MB. Therefore detection takes
longer for larger models.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = "--measured-run"
STEP, STEPS = 6, 14
MODEL = {"num_layers": 9, "num_heads": 6, "model_dim": 384, "hidden_dim": 1024, "seq_len": 32}


def train_measured(folder: Path) -> None:
    """Run mpidp.train in a child process. Record the times of events on the clock that all processes share."""
    from mpi4py import MPI

    import mpidp.runtime.command
    import mpidp.train
    from mpidp.faults.inject import ACTIONS
    from mpidp.runtime import ulfm
    from mpidp.training import after_step

    rank, kill, revoke, log_step = MPI.COMM_WORLD.rank, ACTIONS["kill"], ulfm.revoke, after_step.log_step

    def note(what: str) -> None:
        with open(folder / f"{what}_{rank}", "a") as file:
            file.write(f"{time.monotonic()}\n")

    def noted_kill() -> None:
        note("died")
        kill()

    def noted_revoke() -> None:
        note("knew")
        revoke()

    def noted_step(*args, **kwargs) -> None:
        log_step(*args, **kwargs)
        note("step")

    ACTIONS["kill"], ulfm.revoke, after_step.log_step = noted_kill, noted_revoke, noted_step
    mpidp.runtime.command.run_entry(mpidp.train.main)


def times(folder: Path, what: str) -> list[list[float]]:
    """Return the recorded times, as one list for each rank that recorded times."""
    return [[float(line) for line in path.read_text().split()] for path in sorted(folder.glob(f"{what}_*"))]


def measure(shards: Path, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [f"--model.{key}={value}" for key, value in MODEL.items()] + [
            f"--train.global_batch={options.ranks}", "--train.micro_batch=1", f"--train.steps={STEPS}", "--train.threads=1",
            "--train.device=cpu", "--train.eval_every=0", "--train.eval_tokens=256", "--train.save_every=0",
            f"--data.path={shards}", f"--run.dir={folder / 'run'}", *options.settings]
        launch = ["mpirun", "--with-ft", "ulfm", "-n", str(options.ranks), sys.executable, __file__, CHILD, str(folder)]
        done = subprocess.run([*launch, *settings], capture_output=True, text=True, check=False,
                              env=os.environ | {"MPIDP_FAULT": f"kill:1:{STEP}:{options.phase}"})
        if not (folder / "run" / "metrics.jsonl").exists():
            sys.exit(f"the run did not start ({done.returncode}): is this Open MPI's Python environment?\n{done.stderr[-4000:]}")
        died, knew, steps = (times(folder, what) for what in ("died", "knew", "step"))
        ends = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        if done.returncode or not died or ends[-1].get("event") != "end":
            sys.exit(f"ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        recovered = next(line for line in ends if line.get("event") == "recovered")
        at = died[0][0]
        survivor = steps[0]
        before = [b - a for a, b in zip(survivor, survivor[1:], strict=False) if b < at]
        after = [b - a for a, b in zip(survivor, survivor[1:], strict=False) if a > at]
        return {
            "failure -> first detection": min(map(min, knew)) - at, "failure -> detected by all": max(map(min, knew)) - at,
            "detection -> job is rebuilt": recovered["seconds"],
            "failure -> first completed step": min(one for one in survivor if one > at) - at,
            "step": statistics.median(before[1:]), "step after": statistics.median(after[1:]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--phase", default="reduce,after=0.01", help="phase in which rank 1 fails, as in MPIDP_FAULT")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("settings", nargs="*", help="settings of mpidp.train, after --")
    options = parser.parse_args()
    from data_tools.prepare import prepare

    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "text.txt").write_text("".join(p.read_text() for p in sorted(Path(__file__).parents[1].glob("mpidp/*.py"))))
        prepare(str(Path(name) / "text.txt"), "byte", Path(name) / "shards", shards=1, val_fraction=0.1, verbose=False)
        found = [measure(Path(name) / "shards", options) for _ in range(options.repeats)]
    print(f"{options.ranks} ranks, 16 M parameters (64 MB of gradients), failure in {options.phase}; {options.repeats} runs")
    for what in found[0]:
        seconds = [1e3 * one[what] for one in found]
        print(f"  {what:<32} median {statistics.median(seconds):>7.1f} ms   slowest {max(seconds):>7.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        folder = Path(sys.argv[2])
        del sys.argv[1:3]
        train_measured(folder)
    else:
        main()

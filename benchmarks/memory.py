"""What memory a run takes, beside the formula: several model sizes and numbers of ranks, and settings side by side.

    python benchmarks/memory.py --ranks 1,2,4 --sizes 1M,14M,50M
    python benchmarks/memory.py --ranks 2,4 --sizes 14M --compare comm.reducer=tree "comm.reducer=naive comm.bucket_mb=1"

MiB of all ranks together, by proportional set size (PSS: a page that k processes map counts 1/k in each), so that libraries and
windows of shared memory count once:
  fixed       when the parts are about to be made: Python, torch, MPI, and what was read of the data
  formula     n parameters, with a copy a rank: 4 n parameters + 8 n optimizer + 4 n x slots gradients, summed over ranks;
              (a node): the same with parameters and optimizer state once
  training    at the end of the last step
  rest        training - fixed - formula: activations, communication, scratch, the allocator's slack
and a rank's largest resident set (RSS, where shared pages count in each rank) until the last step ends, and until the run does
(evaluation, checkpoint). Runs are short and batches small. Memory hardly varies between runs, so one run a row is the default.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHILD = "--measured-run"
SHAPES = {  # layers, width, heads; with the byte tokenizer about that many parameters
    "1M": (4, 128, 4), "14M": (8, 384, 6), "50M": (16, 512, 8), "125M": (12, 896, 14),
}
SUMS = ("fixed", "formula", "(a node)", "training", "rest")
PEAKS = ("RSS, steps", "RSS, run")


def own_memory() -> dict[str, int]:
    """This process's memory in bytes: Pss, and the largest resident set so far (VmHWM)."""
    lines = [line for name in ("smaps_rollup", "status") for line in Path(f"/proc/self/{name}").read_text().splitlines()]
    return {key: int(line.split()[1]) * 1024 for line in lines for key in ("Pss", "VmHWM") if line.startswith(f"{key}:")}


def train_and_tell() -> None:
    """In a child: mpidp.train, whose ranks stop between two barriers to read their memory."""
    from mpi4py import MPI

    from mpidp import train
    from mpidp.training import build, loop

    world, found = MPI.COMM_WORLD, {}
    make, log_step = build.build, loop.log_step

    def everyone(value: Any) -> list[Any]:
        world.Barrier()
        values = world.allgather(value() if callable(value) else value)
        world.Barrier()
        return values

    def made(*args: Any, **kwargs: Any) -> Any:
        found["fixed"] = everyone(own_memory)
        return make(*args, **kwargs)

    def logged(job: Any, *args: Any, **kwargs: Any) -> None:
        log_step(job, *args, **kwargs)
        if job.position.step == job.schedule.total_steps:
            found["training"] = everyone(own_memory)
            found["slots"] = everyone(job.strategy.buffer.flat.shape[0])
            found["parameters"] = sum(p.numel() for p in job.engine.model.parameters())

    def main() -> None:
        train.main()
        found["end"] = everyone(own_memory)
        if world.rank == 0:
            print(f"\nmeasured {json.dumps(found)}", flush=True)

    build.build, loop.log_step = made, logged
    train.run_entry(main)


def measure(command: list[str]) -> dict[str, float]:
    """A row: bytes by column, and slots of the rank that has most."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.removeprefix("measured ") for line in done.stdout.splitlines() if line.startswith("measured ")]
    if done.returncode or not lines:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found = json.loads(lines[0])
    n, slots, ranks = found["parameters"], found["slots"], len(found["slots"])
    pss = {when: sum(rank["Pss"] for rank in found[when]) for when in ("fixed", "training")}
    formula = 4 * n * sum(slots) + 12 * n * ranks
    peaks = {name: max(rank["VmHWM"] for rank in found[when]) for name, when in zip(PEAKS, ("training", "end"), strict=True)}
    return {"parameters": n, "slots": max(slots), **pss, "formula": formula, "(a node)": formula - 12 * n * (ranks - 1),
            "rest": pss["training"] - pss["fixed"] - formula, **peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--sizes", default="1M,14M,50M", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--launcher", default="mpirun -np")
    parser.add_argument("--compare", nargs="+", default=[""], metavar="KEY=VALUE", help="measured in turn, without --; "
                        "settings that belong together in one word, with spaces between")
    parser.add_argument("settings", nargs="*", help="settings of mpidp.train for all, after --")
    options = parser.parse_args()
    print(f"{'model':>6} {'parameters':>11} {'ranks':>5} {'slots':>5} " + " ".join(f"{name:>10}" for name in (*SUMS, *PEAKS))
          + "   settings")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "data_tools.prepare", "--tokenizer", "byte", "--out", f"{folder}/shards"],
                       check=True, capture_output=True)
        for size in options.sizes.split(","):
            layers, width, heads = SHAPES[size]
            for ranks in options.ranks.split(","):
                for chosen in options.compare:
                    command = [
                        *options.launcher.split(), ranks, sys.executable, __file__, CHILD, f"--data.path={folder}/shards",
                        f"--run.dir={folder}/run", "--run.resume=never", "--run.keep=1", f"--model.num_layers={layers}",
                        f"--model.model_dim={width}", f"--model.num_heads={heads}", "--train.global_batch=8",
                        "--train.micro_batch=1", "--train.steps=3", "--train.threads=1", "--train.save_every=0",
                        "--train.eval_tokens=1024", *options.settings, *(f"--{word}" for word in chosen.split())]
                    runs = [measure(command) for _ in range(options.repeats)]
                    row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                    print(f"{size:>6} {row['parameters']:>11,} {ranks:>5} {row['slots']:>5} "
                          + " ".join(f"{row[name] / 2**20:>10,.0f}" for name in (*SUMS, *PEAKS)) + f"   {chosen}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        sys.argv.pop(1)
        train_and_tell()
    else:
        main()

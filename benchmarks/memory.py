"""Compares the memory of a run with a formula, for several model sizes, numbers of ranks and settings.

    python benchmarks/memory.py --ranks 1,2,4 --sizes 1M,14M,50M
    python benchmarks/memory.py --ranks 2,4 --sizes 14M --compare comm.reducer=tree "comm.reducer=naive comm.bucket_mb=1"

Columns are in MiB and summed over all ranks. The memory of a process is its proportional set size (PSS): a page that k processes
map counts 1/k in each of them. Therefore libraries and shared-memory windows count once.

- fixed: the memory before the model is built, for Python, torch, MPI, and the data read so far.
- formula: 4 n for the parameters + 8 n for the optimizer state + 4 n x slots for gradients, for n parameters, one copy per rank.
- (a node): the same formula, with one copy of parameters and optimizer state.
- training: the memory at the end of the last step.
- rest: training - fixed - formula, for activations, communication, scratch, and memory that the allocator keeps.

The last two columns are the largest resident set of a rank (RSS, in which shared pages count in each rank). The first of them is
the largest up to the last step, the second up to the end of the run (evaluation, checkpoint). Runs are short, and batches are
small. Memory hardly varies between runs, so the default is one run per row.
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
SHAPES = {  # layers, width, heads, by approximate number of parameters with the byte tokenizer
    "1M": (4, 128, 4), "14M": (8, 384, 6), "50M": (16, 512, 8), "125M": (12, 896, 14),
}
SUMS = ("fixed", "formula", "(a node)", "training", "rest")
PEAKS = ("RSS, steps", "RSS, run")


def own_memory() -> dict[str, int]:
    """Return this process's memory in bytes: the proportional set size (Pss), and the largest resident set so far (VmHWM)."""
    lines = [line for name in ("smaps_rollup", "status") for line in Path(f"/proc/self/{name}").read_text().splitlines()]
    return {key: int(line.split()[1]) * 1024 for line in lines for key in ("Pss", "VmHWM") if line.startswith(f"{key}:")}


def train_measured() -> None:
    """Run mpidp.train in a child process whose ranks read their memory between two barriers."""
    from mpi4py import MPI

    from mpidp import train
    from mpidp.training import after_step, attempts, build

    world, found = MPI.COMM_WORLD, {}
    make, log_step = build.build, after_step.log_step

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

    attempts.build, after_step.log_step = made, logged
    train.run_entry(main)


def measure(command: list[str]) -> dict[str, float]:
    """Return a row of the table: bytes by column, and the largest number of slots of a rank."""
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
    parser.add_argument("--sizes", default="1M,14M,50M", help=f"any of {', '.join(SHAPES)}")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--launcher", default="mpirun -np")
    parser.add_argument("--compare", nargs="+", default=[""], metavar="KEY=VALUE", help="settings to measure in turn, "
                        "without --; several settings that belong together are one quoted word, separated by spaces")
    parser.add_argument("settings", nargs="*", help="settings of mpidp.train for all runs, after --")
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
        train_measured()
    else:
        main()

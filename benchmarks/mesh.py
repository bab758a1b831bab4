"""What `python -m mpidp.plan mesh` predicts beside what mpidp.train takes here, on shapes that it was not fitted to.

    python benchmarks/mesh.py [--shapes "dp=1;dp=2;pp=2;tp=2;dp=2,pp=2"] [--link dp=2] [--repeats 3] [-- --train.steps=40 ...]

Two runs calibrate: one rank (`dp=1`) says how fast products and memory are (mesh_time.measured_machine) and what a step takes
beside; two ranks (`--link`) say how many bytes a second go between ranks. All else is predicted. Runs go in turns; of all steps
of a shape the fastest quarter counts, since others use the machine, too; `spread` is the middle step over it. On a machine with
other load the table means nothing: more ranks then simply get more of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from mpidp.arguments import from_args
from mpidp.config import fields_of
from mpidp.mesh_memory import Model, Shape, Work
from mpidp.mesh_time import Link, Machine, measured_machine, step_of
from mpidp.plan_mesh import model_of_config, vocab_size_of

SETTINGS = [  # a copy a rank, as in a mesh of several nodes; nothing is hidden
    "--model.num_layers=4", "--model.model_dim=256", "--model.num_heads=8", "--model.seq_len=64", "--train.global_batch=16",
    "--train.micro_batch=2", "--train.steps=24", "--train.threads=1", "--train.device=cpu", "--train.dtype=float32",
    "--train.eval_every=0", "--train.eval_tokens=1024", "--train.save_every=0", "--comm.copies=rank", "--comm.overlap=none",
]  # fmt: skip
PHASES = ("step", "compute", "comm_wait", "update")
ONE = Shape(1, 1, 1)


def shape_of(words: str) -> Shape:
    """dp=2,pp=2,tp=1,shard=0, of which any may be left out."""
    return replace(ONE, **{key: int(value) for key, _, value in (word.partition("=") for word in words.split(","))})


def run(shape: Shape, settings: list[str], launcher: str, skip: int, folder: Path) -> list[dict[str, float]] | str:
    """A run's steps, or why there was none."""
    mesh = [f"--mesh.{axis}={getattr(shape, axis)}" for axis in ("dp", "pp", "tp", "shard") if shape != ONE]
    command = [*launcher.split(), str(shape.ranks), sys.executable, "-m", "mpidp.train", f"--run.dir={folder}", *settings, *mesh]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train_loss" in line][skip:]
    return [{phase: line[f"{phase}_seconds"] for phase in PHASES} for line in steps]


def fastest(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean of the fastest quarter."""
    best = sorted(steps, key=lambda step: step["step"])[: max(1, len(steps) // 4)]
    return {phase: statistics.fmean(step[phase] for step in best) for phase in PHASES}


def calibrated(
    model: Model, work: Work, one: dict[str, float], two: dict[str, float], link: Shape, cores: int, late: float
) -> Machine:
    """From a run on one rank and one on two."""
    flops, memory = measured_machine(
        model, work.micro_batch, one["compute"], one["update"], work.micro_batches(ONE), work.number_bytes
    )
    free = Link(0.0, float("inf"))
    machine = Machine(flops, memory, free, free, 1 << 20, max(cores, 1), 0.0)
    step = step_of(model, link, work, machine)
    rest = one["step"] - one["compute"] - one["update"]
    seconds = max(two["step"] - rest - step.seconds, 1e-6)
    sent = step.tp_bytes + step.pp_bytes + step.dp_bytes
    return replace(machine, inside=Link(late, sent / seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="dp=1;dp=2;tp=2;pp=2;dp=4;dp=2,pp=2;dp=2,tp=2;pp=2,tp=2;dp=2,pp=2,tp=2;dp=2,shard=3")
    parser.add_argument("--link", default="dp=2", help="the run on two ranks that says how fast they talk")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", type=int, default=4, help="first steps that do not count")
    parser.add_argument("--latency-us", type=float, default=0.0, help="of a message, which two runs do not tell from bandwidth")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--launcher", default="mpirun -np")
    parser.add_argument("settings", nargs="*", help="settings of mpidp.train, after --")
    options = parser.parse_args()
    settings, link = [*SETTINGS, *options.settings], shape_of(options.link)
    wanted = list(dict.fromkeys([ONE, link, *map(shape_of, options.shapes.split(";"))]))
    found: dict[Shape, list[dict[str, float]]] = {shape: [] for shape in wanted}
    refused: dict[Shape, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for i, shape in enumerate(wanted):
                if shape not in refused:
                    said = run(shape, settings, options.launcher, options.skip, Path(folder) / f"{repeat}-{i}")
                    if isinstance(said, str):
                        refused[shape] = said
                    else:
                        found[shape] += said
    if ONE in refused or link in refused:
        sys.exit(f"the runs that calibrate failed: {refused}")
    middle = {shape: fastest(steps) for shape, steps in found.items() if steps}
    values = {key: value for key, _, value in fields_of(from_args(settings))}
    model = model_of_config(values, vocab_size_of(values))
    recompute = float(values["train.recompute"])
    size = 4 if values["train.dtype"] == "float32" else 2
    work = Work(values["train.global_batch"], values["train.micro_batch"], recompute, size)
    machine = calibrated(model, work, middle[ONE], middle[link], link, options.cores, options.latency_us / 1e6)
    rest = middle[ONE]["step"] - middle[ONE]["compute"] - middle[ONE]["update"]
    print(f"{model.parameters:,} parameters, {options.cores} cores: {machine.flops / 1e9:.3g} GFLOP/s in products, memory "
          f"{machine.memory_bytes_per_second / 1e9:.3g} GB/s, link {machine.inside.bandwidth_bytes_per_second / 1e9:.3g} GB/s")
    print(f"{'mesh':<36} {'measured ms':>12} {'spread':>8} {'predicted':>10} {'off':>7}")
    for shape in wanted:
        name = f"{shape}, {shape.ranks} rank{'s' * (shape.ranks > 1)}"
        if shape in refused:
            print(f"{name:<36} refused: {refused[shape][:90]}")
            continue
        took, told = middle[shape]["step"], rest + step_of(model, shape, work, machine).seconds
        off = "fitted" if shape in (ONE, link) else f"{100 * (told / took - 1):+.1f}%"
        spread = statistics.median(step["step"] for step in found[shape]) / took - 1
        print(f"{name:<36} {1e3 * took:>12.1f} {100 * spread:>7.0f}% {1e3 * told:>10.1f} {off:>7}")


if __name__ == "__main__":
    main()

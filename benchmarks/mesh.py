"""Compares the predictions of `python -m mpidp.plan mesh` with runs of mpidp.train, on meshes to which they were not fitted.

    python benchmarks/mesh.py [--shapes "dp=2;pp=2;tp=2;dp=2,pp=2"] [--repeats 3] [-- --model.num_layers=6 ...]

Four runs of one model (SETTINGS) measure the links. The first run has one rank. The second has two replicas, and determines the
bandwidth between ranks. The third has a stage of two tensor-parallel ranks, and determines the latency of a message. The fourth
has two ranks with shard 3, and determines the host time of a gather. A run of another model (OTHER, or the settings after --) on
one rank measures the speed of matrix products and memory (mesh_time.measured_machine) and the remaining time of a step. All other
meshes of the second model are predicted. Runs alternate. The time of a mesh is the mean of its fastest quarter of steps, because
other programs may use the machine. `spread` is the median time of a step relative to this mean. On a busy machine the table is
meaningless, because a run with more ranks gets a larger share of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mpidp.config.command_line import from_args
from mpidp.plan.mesh.search import model_of_config, vocab_size_of
from mpidp.plan.mesh.sizes import ModelSizes, Shape, Work
from mpidp.plan.mesh.time import LinkSpeed, Machine, measured_machine, step_of

SETTINGS = [  # one copy per rank, as on several nodes; no overlap
    "--model.num_layers=4", "--model.model_dim=256", "--model.num_heads=8", "--model.seq_len=64", "--train.global_batch=16",
    "--train.micro_batch=2", "--train.steps=24", "--train.threads=1", "--train.device=cpu", "--train.dtype=float32",
    "--train.eval_every=0", "--train.eval_tokens=1024", "--train.save_every=0", "--comm.copies=rank", "--comm.overlap=none",
]  # fmt: skip
OTHER = ["--model.num_layers=6", "--model.seq_len=96", "--train.global_batch=12"]
PHASES = ("step", "compute", "comm_wait", "update")
ONE = Shape(1, 1, 1)
LINKS = (ONE, Shape(2, 1, 1), Shape(1, 1, 2), Shape(2, 1, 1, 3))


def shape_of(words: str) -> Shape:
    """Parse a mesh like dp=2,pp=2,tp=1,shard=0. Any of the four may be omitted. Independent."""
    return replace(ONE, **{key: int(value) for key, _, value in (word.partition("=") for word in words.split(","))})


def run(shape: Shape, settings: list[str], launcher: str, skip: int, folder: Path) -> list[dict[str, float]] | str:
    """Return the steps of a run, or the error message if it failed."""
    mesh = [f"--mesh.{axis}={getattr(shape, axis)}" for axis in ("dp", "pp", "tp", "shard") if shape != ONE]
    command = [*launcher.split(), str(shape.ranks), sys.executable, "-m", "mpidp.train", f"--run.dir={folder}", *settings, *mesh]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train_loss" in line][skip:]
    return [{phase: line[f"{phase}_seconds"] for phase in PHASES} for line in steps]


def fastest(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of the fastest quarter of the steps."""
    best = sorted(steps, key=lambda step: step["step"])[: max(1, len(steps) // 4)]
    return {phase: statistics.fmean(step[phase] for step in best) for phase in PHASES}


@dataclass(frozen=True)
class Subject:
    """A model with its batch and precision."""

    settings: list[str]
    model: ModelSizes
    work: Work

    @classmethod
    def of(cls, settings: list[str]) -> Subject:
        values = from_args(settings).flat()
        size = 4 if values["train.dtype"] == "float32" else 2
        return cls(settings, model_of_config(values, vocab_size_of(values)), Work(
            values["train.global_batch"], values["train.micro_batch"], float(values["train.recompute"]), size))

    def computing(self, machine: Machine, one: dict[str, float]) -> Machine:
        """Return the machine with the compute and memory speeds that a run on one rank measured."""
        flops, memory = measured_machine(
            self.model, self.work.micro_batch, one["compute"], one["update"], self.work.micro_batches(ONE), self.work.number_bytes
        )
        return replace(machine, flops=flops, memory_bytes_per_second=memory)

    def predicted(self, shape: Shape, machine: Machine, one: dict[str, float]) -> float:
        """Return the predicted seconds of a step."""
        return one["step"] - one["compute"] - one["update"] + step_of(self.model, shape, self.work, machine).seconds


def linear(seconds: Callable[[float], float], wanted: float, unit: float) -> float:
    """Solve seconds(x) = wanted for a linear function. Return at least 0."""
    low, high = seconds(0.0), seconds(unit)
    return max(0.0, (wanted - low) / (high - low) * unit)


def links(subject: Subject, found: dict[Shape, dict[str, float]], cores: int) -> Machine:
    """Return the machine with link speeds fitted to the runs on LINKS."""
    one, two, tp, gathered = (found[shape] for shape in LINKS)
    free = LinkSpeed(0.0, float("inf"))
    machine = subject.computing(Machine(1.0, 1.0, free, free, 1 << 20, max(cores, 1), 0.0), one)

    def with_link(bandwidth: float, latency: float = 0.0) -> Machine:
        return replace(machine, inside=LinkSpeed(latency, bandwidth))

    slow = 1e9
    share = linear(lambda x: subject.predicted(LINKS[1], with_link(slow / x if x else float("inf")), one), two["step"], 1.0)
    bandwidth = slow / max(share, 1e-3)
    latency = linear(lambda x: subject.predicted(LINKS[2], with_link(bandwidth, x), one), tp["step"], 1e-3)
    machine = with_link(bandwidth, latency)
    each = linear(lambda x: subject.predicted(LINKS[3], replace(machine, gather_seconds=x), one), gathered["step"], 1e-3)
    return replace(machine, gather_seconds=each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="dp=2;pp=2;tp=2;dp=2,shard=1;dp=2,shard=3;dp=4;dp=2,pp=2;dp=2,tp=2;pp=2,tp=2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", type=int, default=4, help="number of first steps to ignore")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--launcher", default="mpirun -np")
    parser.add_argument("settings", nargs="*", help="settings of mpidp.train, after --")
    options = parser.parse_args()
    subjects = Subject.of(SETTINGS), Subject.of([*SETTINGS, *(options.settings or OTHER)])
    wanted = [(subjects[0], shape) for shape in LINKS]
    wanted += [(subjects[1], shape) for shape in dict.fromkeys([ONE, *map(shape_of, options.shapes.split(";"))])]
    steps: list[list[dict[str, float]]] = [[] for _ in wanted]
    failed: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for i, (subject, shape) in enumerate(wanted):
                if i not in failed:
                    result = run(shape, subject.settings, options.launcher, options.skip, Path(folder) / f"{repeat}-{i}")
                    if isinstance(result, str):
                        failed[i] = result
                    else:
                        steps[i] += result
    if set(failed) & set(range(len(LINKS) + 1)):
        sys.exit(f"calibration runs failed: {failed}")
    found = [fastest(those) if those else {} for those in steps]
    machine = links(subjects[0], dict(zip(LINKS, found, strict=False)), options.cores)
    print(f"links: {machine.inside.bandwidth_bytes_per_second / 1e9:.3g} GB/s, {1e6 * machine.inside.latency_seconds:.0f} us per "
          f"message; a gather of a sharded block takes {1e6 * machine.gather_seconds:.0f} us on the host")
    one = found[len(LINKS)]
    machine = subjects[1].computing(machine, one)
    print(f"{subjects[1].model.parameters:,} parameters, {options.cores} cores: {machine.flops / 1e9:.3g} GFLOP/s in products, "
          f"memory {machine.memory_bytes_per_second / 1e9:.3g} GB/s")
    print(f"{'mesh':<42} {'measured ms':>12} {'spread':>8} {'predicted':>10} {'error':>7}")
    for i, (subject, shape) in enumerate(wanted):
        name = f"{shape}, {shape.ranks} rank{'s' * (shape.ranks > 1)}" + ", links" * (i < len(LINKS))
        if i in failed:
            print(f"{name:<42} failed: {failed[i][:84]}")
            continue
        base = found[0] if i < len(LINKS) else one
        at = subject.computing(machine, base)
        measured, predicted = found[i]["step"], subject.predicted(shape, at, base)
        off = "fitted" if i <= len(LINKS) else f"{100 * (predicted / measured - 1):+.1f}%"
        spread = statistics.median(step["step"] for step in steps[i]) / measured - 1
        print(f"{name:<42} {1e3 * measured:>12.1f} {100 * spread:>7.0f}% {1e3 * predicted:>10.1f} {off:>7}", flush=True)


if __name__ == "__main__":
    main()

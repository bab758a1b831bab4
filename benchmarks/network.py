"""Compares all methods on a slow network. Each method trains the same model from the same weights for the same time, over a link
of given speed.

    python benchmarks/network.py --text tinyshakespeare.txt                            # all methods; needs root
    python benchmarks/network.py --methods synchronous,local,ddp --mbit 1000 --ms 1 --seconds 30 --seeds 3
    python benchmarks/network.py --slow 2 --nodes 4 --out network.json --plot network.png -- --optim.lr=2e-3

Nodes are network namespaces (link.py), between which MPI and gloo use TCP. --mbit is the bandwidth of a node in each direction,
and --ms is the one-way delay. For example, 100 and 20 correspond to two sites, 1000 and 1 to a campus, and 10000 and 0 to a
machine room. The time of an Allreduce over the link is printed first. If it is shorter than the link allows, MPI does not use the
link, and the benchmark exits.

A method is a set of settings of mpidp.train with a name. `ddp` is torch's DDP over gloo (ddp.py). The learning rate is constant
after its warm-up, so that no method benefits from a schedule that ends at the same time as the run. Time counts only steps,
without start-up and evaluations. Losses are nats per token on held-out text. They are interpolated linearly between evaluations,
and are not known before the first evaluation. If a loss is reached before the first evaluation, the time of this evaluation is
printed. `counted` is the number of bytes that rank 0 counted, and `on the wire` is the number that left a node's interface, both
in MB per step. `waits` is the fraction of time in which rank 0 waited for messages. With several seeds, medians and half the
range are printed. All nodes share this machine's cores and memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from link import OF_RANKS, SCRATCH, Link, go_inside, impossible

from data_tools.prepare import prepare
from mpidp.config.command_line import from_args
from mpidp.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
SETTING = [
    "--model.num_layers=4", "--model.num_heads=4", "--model.model_dim=256", "--model.seq_len=64", "--train.global_batch=16",
    "--train.micro_batch=2", "--train.threads=1", "--train.device=cpu", "--train.dtype=float32", "--train.steps=1000000",
    "--train.eval_tokens=8192", "--train.save_every=0", "--optim.name=adamw", "--optim.schedule=constant", "--optim.lr=1e-3",
    "--optim.warmup_steps=20",
]
SHORT = [
    "--model.num_layers=1", "--model.num_heads=2", "--model.model_dim=32", "--train.global_batch=4", "--train.eval_tokens=1024",
]
LOCAL = ["--strategy.name=local", "--strategy.sync_every=50"]
METHODS: dict[str, list[str]] = {
    "synchronous": ["--strategy.name=synchronous"],
    "allreduce": ["--comm.reducer=allreduce"],
    **{kind: [f"--comm.compress={kind}"]
       for kind in ("bf16", "fp16", "int8", "int4", "int2", "onebit", "topk", "randomk", "powersgd")},
    "topk-warm": ["--comm.compress=topk", "--comm.ratio_warmup=100", "--comm.momentum=0.9", "--optim.beta1=0"],
    "delayed": ["--strategy.name=delayed"],
    "quorum": ["--strategy.quorum=0.5"],
    "local": LOCAL,
    "local+topk": [*LOCAL, "--comm.compress=topk"],
    "local+int2": [*LOCAL, "--comm.compress=int2", "--strategy.sync_every=70"],  # a thousandth of the bytes of synchronous
    "local-overlap": [*LOCAL, "--strategy.overlap=true"],
    **{f"local-{group}": [*LOCAL, f"--strategy.group={group}"] for group in ("pairs", "exponential", "rotating", "node")},
    **{f"server-{mode}": ["--strategy.name=server", f"--strategy.mode={mode}"] for mode in ("sync", "async", "ssp")},
}
PEERS = {"ddp": "none", "ddp-fp16": "fp16", "ddp-powersgd": "powersgd"}  # ddp.py's --hook
START_SECONDS, STOP_SECONDS = 180.0, 60.0  # a run that does not step, or end, within this time is killed


class Watch:
    """Reads a run's metrics.jsonl while it grows, and records the steps and the loss by time and tokens."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self.steps: list[dict[str, Any]] = []
        self.curve: list[tuple[float, int, float]] = []  # (seconds, tokens, held-out loss)
        self.seconds = 0.0

    def poll(self) -> None:
        """Read the lines that were completed since the last call."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._read)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self._read += len(new)
        for line in map(json.loads, new.splitlines()):
            if "step_seconds" in line:
                self.steps.append(line)
                self.seconds += line["step_seconds"]
            elif "val_tokens" in line:
                loss = math.inf if line["val_loss"] is None else line["val_loss"]
                self.curve.append((self.seconds, self.steps[-1]["tokens"], loss))


def rejection(settings: list[str]) -> str:
    """Return why the installed mpidp rejects these settings, or an empty string. Independent."""
    try:
        from_args(settings)
    except UsageError as error:
        unknown = "unknown setting" in str(error) or "is not one of" in str(error)
        return "not supported by this version" if unknown else f"rejected: {error}"
    return ""


def train(link: Link, name: str, seed: int, settings: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Run one method until the first evaluation after its time."""
    run_dir, log = SCRATCH / f"{name}-{seed}", SCRATCH / f"{name}-{seed}.txt"
    program = [str(ROOT / "benchmarks" / "ddp.py"), "--hook", PEERS[name]] if name in PEERS else ["-m", "mpidp.train"]
    fault = {"MPIDP_FAULT": f"delay:1:1,factor={options.slow}"} if options.slow > 1 else {}
    watch, before, after = Watch(run_dir / "metrics.jsonl"), None, None
    deadline = time.monotonic() + START_SECONDS
    process = link.start([*program, *settings, f"--train.seed={seed}", f"--run.dir={run_dir}"], log, **fault)
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            watch.poll()
            if watch.steps and before is None:
                before = len(watch.steps), link.sent_bytes()
                deadline = time.monotonic() + START_SECONDS + 5 * options.seconds
            if after is None and watch.curve and watch.curve[-1][0] >= options.seconds:
                after = len(watch.steps), link.sent_bytes()
                (run_dir / "STOP").touch()
                deadline = time.monotonic() + STOP_SECONDS
        code = process.poll()
    finally:
        link.sweep()
        process.wait()
    if before is None or after is None or code not in (0, 75):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "rror" in line or line.startswith("mpidp: ")] or lines or ["no output"]
        ended = f"ended with {code}" if code is not None else "did not stop at its STOP file" if after else "hung"
        return {"problem": f"failed, {ended} after {len(watch.steps)} steps: {errors[0].strip()[:200]}", "said": lines[-100:]}
    steps = watch.steps
    counted = [line["comm_bytes"] for line in steps[before[0] : after[0]]]
    waited = sum(line["comm_wait_seconds"] for line in steps)
    shutil.rmtree(run_dir)
    return {
        "curve": watch.curve, "steps": round(options.seconds / watch.seconds * len(steps)),
        "step_ms": 1e3 * watch.seconds / len(steps),
        "final_loss": at(watch.curve, 0, options.seconds), "waits": waited / watch.seconds,
        "counted_bytes": None if None in counted else sum(counted) / len(counted),
        "wire_bytes": [(b - a) / (after[0] - before[0]) for a, b in zip(before[1], after[1], strict=True)],
    }


def at(curve: list[tuple[float, int, float]], axis: int, where: float) -> float:
    """Return the loss after `where` seconds (axis 0) or tokens (axis 1). Before the first evaluation, return NaN."""
    return float(np.interp(where, [point[axis] for point in curve], [point[2] for point in curve], left=math.nan))


def seconds_to(curve: list[tuple[float, int, float]], target: float) -> float:
    """Return the time at which the loss was first reached, or infinity if it was not reached."""
    before = None
    for seconds, _, loss in curve:
        if loss <= target:
            share = (before[1] - target) / (before[1] - loss) if before and math.isfinite(before[1]) else 1.0
            return before[0] + share * (seconds - before[0]) if before else seconds
        before = seconds, loss
    return math.inf


def middle(values: list[float], digits: int) -> str:
    """Format the median, and half the range if there are several values."""
    if not all(map(math.isfinite, values)):
        return "-"
    spread = f" ±{(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.median(values):.{digits}f}{spread}"


def table(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    whole = {name: runs for name, runs in found.items() if not any("problem" in run for run in runs)}
    if whole:
        first = next(iter(whole))
        target = options.target or statistics.median(run["final_loss"] for run in whole[first])
        tokens = min(run["curve"][-1][1] for runs in whole.values() for run in runs)
        print(f"\n| method | loss at {options.seconds:g} s | loss at {tokens:,} tokens | steps | ms a step | s to {target:.3f} | "
              "MB a step counted | on the wire | waits |\n|---|---|---|---|---|---|---|---|---|")
    for name, runs in found.items():
        if name not in whole:
            print(f"| {name} | {next(run['problem'] for run in runs if 'problem' in run)} |" + " |" * 7)
            continue
        counted = [run["counted_bytes"] for run in runs]
        cells = [
            middle([run["final_loss"] for run in runs], 3), middle([at(run["curve"], 1, tokens) for run in runs], 3),
            middle([run["steps"] for run in runs], 0), middle([run["step_ms"] for run in runs], 0),
            middle([seconds_to(run["curve"], target) for run in runs], 1),
            "-" if None in counted else middle([count / 1e6 for count in counted], 3),
            middle([statistics.mean(run["wire_bytes"]) / 1e6 for run in runs], 3),
            middle([100 * run["waits"] for run in runs], 0) + "%",
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


def plot(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=140)
    for name, runs in found.items():
        if "curve" in runs[0]:
            axes.plot(*zip(*[(seconds, loss) for seconds, _, loss in runs[0]["curve"]], strict=True), label=name, linewidth=1.2)
    axes.set_xlabel(f"seconds of training, {options.nodes} nodes, {options.mbit:g} Mbit/s, {options.ms:g} ms")
    axes.set_ylabel("held-out loss (nats a token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(options.plot)


def mpi_of_path() -> str:
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False, env=os.environ | OF_RANKS)
    return "mpich" if "HYDRA" in version.stdout else "openmpi"


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, default=Path("tinyshakespeare.txt"), help="a file or folder; the last tenth is held out")
    add("--tokenizer", default="char", help="as for data_tools.prepare")
    add("--methods", help=f"any of {', '.join([*METHODS, *PEERS])} (default: all); the final loss of the first is the target")
    add("--nodes", type=int, default=2)
    add("--ranks-per-node", type=int, default=1)
    add("--mbit", type=float, default=100, help="bandwidth of a node in each direction (%(default)s)")
    add("--ms", type=float, default=20, help="one-way delay between nodes (%(default)s)")
    add("--seconds", type=float, default=60, help="training time of a run (%(default)s)")
    add("--seeds", type=int, default=1, help="runs of each method (%(default)s)")
    add("--slow", type=float, default=1, help="factor by which rank 1 is slowed down (%(default)s)")
    add("--target", type=float, default=0, help="report times to this loss (default: the first method's final loss)")
    add("--eval-every", type=int, default=10, help="steps between evaluations (%(default)s)")
    add("--mpi", choices=("mpich", "openmpi"), help="MPI to use, from .venv or .venv-openmpi (default: the mpirun on PATH)")
    add("--short", action="store_true", help="only test that it runs: a tiny model, two methods, 4 s each, 1 Gbit/s, 1 ms")
    add("--out", type=Path, help="write all results as JSON")
    add("--plot", type=Path, help="plot the loss by time as PNG (needs matplotlib)")
    add("settings", nargs="*", help="more settings of mpidp.train for all methods, after --")
    options = parser.parse_args()
    if options.short:
        options.mbit, options.ms, options.seconds, options.settings = 1000, 1, 4, [*SHORT, *options.settings]
        options.methods = options.methods or "synchronous,ddp"
    options.methods = options.methods.split(",") if options.methods else [*METHODS, *PEERS]
    if options.nodes < 2 or options.ranks_per_node < 1 or options.mbit <= 0 or options.ms < 0:
        parser.error("needs --nodes >= 2, --ranks-per-node >= 1, --mbit > 0 and --ms >= 0")
    if wrong := [name for name in options.methods if name not in METHODS and name not in PEERS]:
        parser.error(f"--methods: unknown: {', '.join(wrong)}; choose from {', '.join([*METHODS, *PEERS])}")
    return options


def main() -> None:
    options = read_options()
    if options.mpi and (shutil.which("mpirun") is None or mpi_of_path() != options.mpi):
        folder = ROOT / {"mpich": ".venv", "openmpi": ".venv-openmpi"}[options.mpi] / "bin"
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    reason = impossible(options.ms)
    if not reason and not options.text.exists():
        reason = f"{options.text} does not exist; give --text FILE, for example the tinyshakespeare text of char-rnn"
    if reason:
        print(f"skipped: {reason}")
        return
    go_inside()
    link = Link(options.nodes, options.ranks_per_node, options.mbit, options.ms, options.mpi or mpi_of_path())
    print(f"{options.nodes} nodes, {options.ranks_per_node} ranks per node, {options.mbit:g} Mbit/s, {options.ms:g} ms one way, "
          f"{link.mpi}, {options.seconds:g} s per run, {options.seeds} seeds, rank 1 slowed by {options.slow:g}, "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    allreduce = link.check()
    prepare(str(options.text), options.tokenizer, SCRATCH / "shards", shards=1, val_fraction=0.1, verbose=False)
    common = [f"--data.path={SCRATCH / 'shards'}", f"--train.eval_every={options.eval_every}", *SETTING, *options.settings]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.methods}
    for seed in range(1, options.seeds + 1):
        for name in options.methods:
            settings = [*common, *METHODS.get(name, [])]
            problem = rejection(settings)
            if seed > 1 and "problem" in found[name][0]:
                continue
            run = {"problem": problem} if problem else train(link, name, seed, settings, options)
            found[name].append(run)
            result = problem or run.get("problem") or f"{run['final_loss']:.3f} at {options.seconds:g} s, {run['steps']} steps"
            print(f"seed {seed}  {name}: {result}", flush=True)
    table(found, options)
    if options.out:
        setting = {key: str(value) for key, value in vars(options).items()}
        options.out.write_text(json.dumps({"options": setting, "allreduce": allreduce, "found": found}, indent=1))
    if options.plot:
        plot(found, options)


if __name__ == "__main__":
    main()

"""Every method on a slow network: the same model from the same start, for the same time, over a link that is really that slow.

    python benchmarks/network.py --text tinyshakespeare.txt                            # all methods; as root: it makes networks
    python benchmarks/network.py --methods synchronous,local,ddp --mbit 1000 --ms 1 --seconds 30 --seeds 3
    python benchmarks/network.py --slow 2 --nodes 4 --out network.json --plot network.png -- --optim.lr=2e-3

Nodes are network namespaces (link.py); MPI and gloo talk TCP between them. --mbit is each node's bandwidth each way, --ms the
delay one way: 100 and 20 are two sites, 1000 and 1 a campus, 10000 and 0 a machine room. What an Allreduce takes over the link is
printed first; when that is less than the link can take, the link is not the path, and nothing is measured.

A method is a name and settings of mpidp.train; `ddp` is torch's over gloo (ddp.py). The learning rate is constant after its
warm-up, so that no method is favoured by where its time ends. Time is that of steps alone, without start-up and evaluations.
Losses are nats a token on held-out text, between two evaluations by a straight line, and before the first unknown: a time to a
loss that was there already at the first evaluation is that evaluation's, at the latest. `counted` is what rank 0 says that it
sent a step, `on the wire` what left a node through its interface, both in MB a step; `waits` is the share of the time in which
rank 0 waited for messages. With several seeds: medians, and half the range. All nodes share this machine's cores and memory.
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
    "local+int2": [*LOCAL, "--comm.compress=int2", "--strategy.sync_every=70"],  # a thousandth of synchronous' bytes
    "local-overlap": [*LOCAL, "--strategy.overlap=true"],
    **{f"local-{group}": [*LOCAL, f"--strategy.group={group}"] for group in ("pairs", "exponential", "rotating", "node")},
    **{f"server-{mode}": ["--strategy.name=server", f"--strategy.mode={mode}"] for mode in ("sync", "async", "ssp")},
}
PEERS = {"ddp": "none", "ddp-fp16": "fp16", "ddp-powersgd": "powersgd"}  # ddp.py's --hook
START_SECONDS, STOP_SECONDS = 180.0, 60.0  # after which a run that does not step, or end, is given up


class Watch:
    """metrics.jsonl of a run as it grows: its steps, and its loss by time and tokens."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self.steps: list[dict[str, Any]] = []
        self.curve: list[tuple[float, int, float]] = []  # (seconds, tokens, held-out loss)
        self.seconds = 0.0

    def look(self) -> None:
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


def refused(settings: list[str]) -> str:
    """What the installed mpidp says against these settings, before anything is started."""
    try:
        from_args(settings)
    except UsageError as error:
        unknown = "there is no setting" in str(error) or "is not one of" in str(error)
        return "not there" if unknown else f"refused: {error}"
    return ""


def train(link: Link, name: str, seed: int, settings: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One run until the first evaluation after its time."""
    run_dir, said = SCRATCH / f"{name}-{seed}", SCRATCH / f"{name}-{seed}.txt"
    program = [str(ROOT / "benchmarks" / "ddp.py"), "--hook", PEERS[name]] if name in PEERS else ["-m", "mpidp.train"]
    fault = {"MPIDP_FAULT": f"delay:1:1,factor={options.slow}"} if options.slow > 1 else {}
    watch, before, after = Watch(run_dir / "metrics.jsonl"), None, None
    deadline = time.monotonic() + START_SECONDS
    process = link.start([*program, *settings, f"--train.seed={seed}", f"--run.dir={run_dir}"], said, **fault)
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            watch.look()
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
        lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if "rror" in line or line.startswith("mpidp: ")] or lines or ["it said nothing"]
        ended = f"ended with {code}" if code is not None else "did not stop when asked to" if after else "hung"
        return {"problem": f"failed, {ended} after {len(watch.steps)} steps: {told[0].strip()[:200]}", "said": lines[-100:]}
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
    """The loss after so many seconds (axis 0) or tokens (axis 1); not a number before the first evaluation."""
    return float(np.interp(where, [point[axis] for point in curve], [point[2] for point in curve], left=math.nan))


def seconds_to(curve: list[tuple[float, int, float]], target: float) -> float:
    """When the loss first was there; infinite when it never was."""
    before = None
    for seconds, _, loss in curve:
        if loss <= target:
            share = (before[1] - target) / (before[1] - loss) if before and math.isfinite(before[1]) else 1.0
            return before[0] + share * (seconds - before[0]) if before else seconds
        before = seconds, loss
    return math.inf


def middle(values: list[float], digits: int) -> str:
    """Median, and half the range of several."""
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
    said = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False, env=os.environ | OF_RANKS)
    return "mpich" if "HYDRA" in said.stdout else "openmpi"


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, default=Path("tinyshakespeare.txt"), help="a file or a folder; its last tenth is held out")
    add("--tokenizer", default="char", help="as of data_tools.prepare")
    add("--methods", help=f"of {', '.join([*METHODS, *PEERS])}; the first one's final loss is the target (all)")
    add("--nodes", type=int, default=2)
    add("--ranks-per-node", type=int, default=1)
    add("--mbit", type=float, default=100, help="of each node, each way (%(default)s)")
    add("--ms", type=float, default=20, help="from node to node, one way (%(default)s)")
    add("--seconds", type=float, default=60, help="of training, a run (%(default)s)")
    add("--seeds", type=int, default=1, help="runs of each method (%(default)s)")
    add("--slow", type=float, default=1, help="rank 1 takes so many times as long for its micro-batches (%(default)s)")
    add("--target", type=float, default=0, help="the loss to which times are told (the first method's at the end)")
    add("--eval-every", type=int, default=10, help="steps (%(default)s)")
    add("--mpi", choices=("mpich", "openmpi"), help="the one on the PATH, or that of .venv and .venv-openmpi")
    add("--short", action="store_true", help="that it runs, not how fast: a tiny model, two methods, 4 s each, 1 Gbit/s and 1 ms")
    add("--out", type=Path, help="all that was found, as JSON")
    add("--plot", type=Path, help="loss by time, as PNG (needs matplotlib)")
    add("settings", nargs="*", help="more settings of mpidp.train, for all methods, after --")
    options = parser.parse_args()
    if options.short:
        options.mbit, options.ms, options.seconds, options.settings = 1000, 1, 4, [*SHORT, *options.settings]
        options.methods = options.methods or "synchronous,ddp"
    options.methods = options.methods.split(",") if options.methods else [*METHODS, *PEERS]
    if options.nodes < 2 or options.ranks_per_node < 1 or options.mbit <= 0 or options.ms < 0:
        parser.error("a link has at least two nodes with a rank each, a bandwidth, and a delay of 0 or more")
    if wrong := [name for name in options.methods if name not in METHODS and name not in PEERS]:
        parser.error(f"--methods: {', '.join(wrong)}: there is {', '.join([*METHODS, *PEERS])}")
    return options


def main() -> None:
    options = read_options()
    if options.mpi and (shutil.which("mpirun") is None or mpi_of_path() != options.mpi):
        folder = ROOT / {"mpich": ".venv", "openmpi": ".venv-openmpi"}[options.mpi] / "bin"
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    reason = impossible(options.ms)
    if not reason and not options.text.exists():
        reason = f"there is no {options.text}; give --text FILE, for example the tinyshakespeare text of char-rnn"
    if reason:
        print(f"skipped: {reason}")
        return
    go_inside()
    link = Link(options.nodes, options.ranks_per_node, options.mbit, options.ms, options.mpi or mpi_of_path())
    print(f"{options.nodes} nodes of {options.ranks_per_node}, {options.mbit:g} Mbit/s, {options.ms:g} ms one way, {link.mpi}, "
          f"{options.seconds:g} s a run, seeds {options.seeds}, rank 1 slowed by {options.slow:g}, {os.cpu_count()} cores, "
          f"load {os.getloadavg()[0]:.1f}")
    allreduce = link.check()
    prepare(str(options.text), options.tokenizer, SCRATCH / "shards", shards=1, val_fraction=0.1, say=False)
    common = [f"--data.path={SCRATCH / 'shards'}", f"--train.eval_every={options.eval_every}", *SETTING, *options.settings]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.methods}
    for seed in range(1, options.seeds + 1):
        for name in options.methods:
            settings = [*common, *METHODS.get(name, [])]
            problem = refused(settings)
            if seed > 1 and "problem" in found[name][0]:
                continue
            run = {"problem": problem} if problem else train(link, name, seed, settings, options)
            found[name].append(run)
            words = problem or run.get("problem") or f"{run['final_loss']:.3f} at {options.seconds:g} s, {run['steps']} steps"
            print(f"seed {seed}  {name}: {words}", flush=True)
    table(found, options)
    if options.out:
        setting = {key: str(value) for key, value in vars(options).items()}
        options.out.write_text(json.dumps({"options": setting, "allreduce": allreduce, "found": found}, indent=1))
    if options.plot:
        plot(found, options)


if __name__ == "__main__":
    main()

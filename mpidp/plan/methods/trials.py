"""Implements `python -m mpidp.plan methods`: measures compute time and link speed, and with --run trains with each method for
a short time (a trial).

Trial runs are written to a temporary folder beside run.dir, on a disk that all nodes must share. During the trials, one line per
method is printed on standard error.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidp.config.schema import Config
from mpidp.data.shard_folder import open_index
from mpidp.doctor import network
from mpidp.errors import MpidpError, Stopped, UsageError
from mpidp.metrics.jsonl import read_lines
from mpidp.parallel.grid import make_grid
from mpidp.plan.cluster_file import read_cluster
from mpidp.plan.methods.predict import MethodRow, predict, recommend, variant, with_speeds
from mpidp.plan.methods.traffic import Cluster, cluster_of, lanes_of, link_of
from mpidp.plan.ranks.predict import most_micro_batches
from mpidp.runtime.device import resolve_threads
from mpidp.runtime.environment import launched_with_ulfm
from mpidp.runtime.topology import make_topology
from mpidp.runtime.world import polite_barrier, raise_together
from mpidp.training import build, loop
from mpidp.training.attempts import listen
from mpidp.training.initial_weights import open_origin
from mpidp.training.run_plan import plan

if TYPE_CHECKING:
    from mpi4py import MPI

TIMED = 6  # number of steps of a compute measurement, of which the second half is timed
PILOT = 0.2  # fraction of a trial's time: before the trial, a run of this length measures the step time


@dataclass(frozen=True)
class TrialOptions:
    """The options of `plan methods`."""

    ranks: int = 0  # number of ranks; 0: the ranks of this launch; if it has only one, the number in cluster.json
    cluster: str = ""  # path of cluster.json
    link: str = ""  # "MBIT,MS": bandwidth and delay
    step_seconds: float = 0.0  # compute time per step; 0: measure it
    seconds: float = 0.0  # duration of each trial; 0: no trials
    methods: tuple[str, ...] = ()  # methods to compare; empty: all


@dataclass
class TrialResult:
    """The result of a trial, which rank 0 has read from the metrics.jsonl of the trial."""

    problem: str = ""  # error message of a trial that failed
    loss: float = 0.0  # loss at the end
    loss_name: str = ""  # "val_loss" or "train_loss"
    curve: list[tuple[float, int, float]] = field(default_factory=list)  # (seconds, bytes sent, train_loss) after each step

    @property
    def steps(self) -> int:
        """The number of steps of the trial."""
        return len(self.curve)

    @property
    def step_seconds(self) -> float:
        """The mean time of a step in seconds, without the first two steps (warm-up)."""
        begin = min(2, self.steps - 1)
        return (self.curve[-1][0] - (self.curve[begin - 1][0] if begin else 0.0)) / (self.steps - begin)


def compare_methods(config: Config, options: TrialOptions, world: MPI.Intracomm) -> dict[str, Any]:
    """Compare the methods. Return the results as plain values, the same on all ranks.

    Raises UsageError if the options cannot be used together, and DataError if the data cannot be read. Collective over world."""
    if options.seconds and world.size == 1:
        raise UsageError("--run needs several ranks, but there is only one. Start with mpirun -np N python -m mpidp.plan ...")
    if options.seconds and options.ranks not in (0, world.size):
        raise UsageError.on_every_rank(
            f"--ranks={options.ranks}, but --run trains on the {world.size} ranks of this launch. Omit --ranks"
        )
    if divided := [f"{key}={value}" for key, usual, value in (
        ("mesh.tp", 1, config.mesh.tp), ("mesh.pp", 1, config.mesh.pp), ("mesh.shard", 0, config.mesh.shard)
    ) if value != usual]:
        raise UsageError.on_every_rank(
            f"{', '.join(divided)}: `plan methods` compares methods only for models that are not divided among ranks. Omit these "
            "settings, or use `plan mesh`"
        )
    if not config.train.micro_batch:
        raise UsageError.on_every_rank("train.micro_batch=auto: `plan methods` needs a number. Set train.micro_batch to a number")
    if options.seconds and launched_with_ulfm():
        raise UsageError.on_every_rank(
            "--run trains one method after the other, but with ULFM the shared memory of a run is freed only when the job ends. "
            "Start without --with-ft ulfm"
        )
    origin = open_origin(config, world)
    with raise_together(world):
        config = config if origin is None else origin.completed(config)
    cluster, where = find_cluster(config, options, world)
    with raise_together(world):
        vocab_size = open_index(config.data.path).vocab_size
        lanes = lanes_of(config)
        if cluster.ranks > lanes.num_lanes:
            raise UsageError(
                f"{cluster.ranks} ranks, but the global batch has only {lanes.num_lanes} lanes (sequences of micro-batches; "
                "each rank needs at least one). Lower --ranks, or raise train.global_batch"
            )
    compute = options.step_seconds or compute_seconds(config, most_micro_batches(lanes, cluster.ranks), world)
    predicted = predict(config, vocab_size, cluster, compute, options.methods)
    rows, runs = predicted, dict[str, TrialResult]()
    if options.seconds:
        runs = try_all(config, predicted, options.seconds, world)
        rows = with_speeds([_measured(row, runs[row.method]) if row.method in runs else row for row in predicted])
    best, why = recommend(rows, bool(options.seconds))
    return {
        **asdict(cluster), "link_from": where, "compute_seconds": compute, "compute_given": bool(options.step_seconds),
        "tried_seconds": options.seconds, "loss_name": next((run.loss_name for run in runs.values() if not run.problem), ""),
        "foretold": [asdict(row) for row in predicted], "rows": [asdict(row) for row in rows],
        "took_seconds": {name: run.curve[-1][0] for name, run in runs.items() if run.curve},
        "curves": {name: run.curve for name, run in runs.items() if run.curve}, "recommended": best, "why": why,
    }  # fmt: skip


def find_cluster(config: Config, options: TrialOptions, world: MPI.Intracomm) -> tuple[Cluster, str]:
    """Return (cluster, source of its figures). The source is --link, cluster.json, or a measurement between the ranks of this
    launch. Raises UsageError if none of these is available. Collective over world."""
    ranks = options.ranks or (world.size if world.size > 1 else 0)
    if options.link:
        if not ranks:
            raise UsageError("--link needs the number of ranks. Give --ranks as well")
        return link_of(options.link, ranks), f"--link={options.link}"
    places = [Path(options.cluster)] if options.cluster else [Path(config.run.dir) / "cluster.json", Path("cluster.json")]
    found: tuple[str, dict[str, Any]] | None = None
    with raise_together(world):
        if world.rank == 0:
            found = next(((str(place), read_cluster(place)) for place in places if place.is_file()), None)
            if options.cluster and found is None:
                raise UsageError(f"--cluster={options.cluster}: no such file. `mpirun -np N python -m mpidp.doctor` writes one")
    found = world.bcast(found, root=0)
    if found is not None:
        with raise_together(world):
            cluster = cluster_of(found[1], ranks, found[0])
        return cluster, found[0]
    if world.size == 1:
        raise UsageError(
            "the link speed is not known, because there is no cluster.json. Do one of these: write cluster.json with `mpirun -np "
            "N python -m mpidp.doctor` on the nodes of the job, give --link=MBIT,MS, or start this command with mpirun"
        )
    mesh = make_topology(world)
    hosts = [host for host, size in zip(mesh.hosts, mesh.node_sizes, strict=True) for _ in range(size)]
    link = network.summary(network.measure(mesh.dp, hosts, thorough=False))
    about = {**link, "ranks": world.size, "ranks_per_node": mesh.node_sizes}
    return cluster_of(about, ranks, "this launch"), "measured just now"


def compute_seconds(config: Config, micro_batches: int, world: MPI.Intracomm) -> float:
    """Measure the compute time of a step with `micro_batches` micro-batches per rank. All ranks measure at the same time. Return
    the time of the slowest rank in seconds. Collective over world."""
    from mpi4py import MPI

    threads = resolve_threads(config.train.threads, make_topology(world))
    alone = variant(config, "synchronous").with_values(
        train={"global_batch": config.train.micro_batch * micro_batches, "lanes": 0, "threads": threads},
        comm={"reducer": "auto"},
    )
    own = 0.0
    with raise_together(world), tempfile.TemporaryDirectory(prefix="mpidp-plan-") as folder:
        run = trial(_with_short_evaluation(alone), TIMED, Path(folder) / "run", MPI.COMM_SELF)
        if run.problem:
            raise UsageError(run.problem)
        times = [point[0] for point in run.curve]
        steps = [late - early for early, late in zip(times, times[1:], strict=False)]
        own = statistics.median(steps[TIMED // 2 - 1 :])
    return max(world.allgather(own))


@contextmanager
def folder_beside(run_dir: Path, world: MPI.Intracomm) -> Iterator[Path]:
    """Return a context manager whose value is a new temporary folder beside run_dir. The folder is deleted at the end. Raises
    UsageError if the folder cannot be created. Collective over world."""
    made = ""
    with raise_together(world):
        if world.rank == 0:
            try:
                run_dir.parent.mkdir(parents=True, exist_ok=True)
                made = tempfile.mkdtemp(prefix=".methods-", dir=run_dir.parent)
            except OSError as error:
                raise UsageError(f"run.dir={run_dir}: the folder that contains it cannot be written ({error})") from error
    made = world.bcast(made, root=0)
    try:
        yield Path(made)
    finally:
        if world.rank == 0:
            shutil.rmtree(made, ignore_errors=True)


def try_all(config: Config, rows: list[MethodRow], seconds: float, world: MPI.Intracomm) -> dict[str, TrialResult]:
    """Train with each usable method for about `seconds` seconds. A short run before each trial measures the step time, which
    determines the number of steps of the trial. Return {method: result}. Collective over world."""
    found: dict[str, TrialResult] = {}
    with folder_beside(Path(config.run.dir), world) as folder:
        for row in rows:
            if row.refused or not row.step_seconds:
                continue
            chosen = variant(config, row.method)
            found[row.method] = run = trial(
                _with_short_evaluation(chosen), _steps(PILOT * seconds, row.step_seconds), folder / "pilot", world
            )
            if not run.problem:
                found[row.method] = run = trial(chosen, _steps(seconds, run.step_seconds), folder / "run", world)
            if world.rank == 0:
                text = run.problem or f"{run.loss_name} {run.loss:.4f} after {run.steps} steps"
                print(f"{row.method}: {text}", file=sys.stderr, flush=True)
    return found


def _with_short_evaluation(config: Config) -> Config:
    """Return the configuration of a run that only measures step times. The evaluation at the end of this run uses only one
    sequence."""
    return config.with_values(train={"eval_tokens": config.model.seq_len})


def _steps(seconds: float, each: float) -> int:
    return max(4, round(seconds / each))


def trial(config: Config, steps: int, run_dir: Path, world: MPI.Intracomm) -> TrialResult:
    """Train for `steps` steps from the initial weights, with a constant learning rate after the warm-up. Write the run to
    `run_dir`, and delete it afterwards. Return the result, the same on all ranks. Collective over world."""
    config = config.with_values(
        train={"steps": steps, "tokens": 0, "epochs": 0.0, "eval_every": 0, "save_every": 0, "target_loss": 0.0, "patience": 0},
        optim={"schedule": "constant", "warmup_steps": -1}, run={"dir": str(run_dir), "resume": "never"},
    )
    with raise_together(world):
        if world.rank == 0:
            run_dir.mkdir()
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            job = build.build(plan(config, make_grid(world)))
            end = loop.run_to_end(job, listen(job, None), [])
    except Stopped as stop:
        raise Stopped.on_every_rank("stopped on request; the trials are deleted") from stop
    except MpidpError as error:
        if not error.everywhere and world.size > 1:
            raise
        if world.rank == 0:
            shutil.rmtree(run_dir, ignore_errors=True)
        polite_barrier(world)
        return TrialResult(problem=str(error))
    result: TrialResult | None = None
    with raise_together(world):
        if world.rank == 0:
            result = _read(run_dir / "metrics.jsonl", end["val_loss"])
            shutil.rmtree(run_dir)
    polite_barrier(world)
    return world.bcast(result, root=0)


def _read(metrics: Path, val_loss: float | None) -> TrialResult:
    """Return the result of a trial. metrics: its metrics.jsonl. val_loss: the last val_loss of the trial, which becomes the loss
    of the result. If val_loss is None, the loss is the mean train_loss of the last quarter of the steps. Independent."""
    lines = [line for line in read_lines(metrics) if "step_seconds" in line]
    seconds, sent, curve = 0.0, 0, list[tuple[float, int, float]]()
    for line in lines:
        seconds, sent = seconds + line["step_seconds"], sent + line["comm_bytes"]
        if "train_loss" in line:  # otherwise the batch was skipped
            curve.append((seconds, sent, line["train_loss"]))
    if not curve or any(loss is None for _, _, loss in curve) or not math.isfinite(val_loss or 0.0):
        return TrialResult(problem="the loss was not finite, or no step updated the model")
    if val_loss is not None:
        return TrialResult("", val_loss, "val_loss", curve)
    return TrialResult("", statistics.mean(loss for _, _, loss in curve[-max(1, len(curve) // 4) :]), "train_loss", curve)


def _measured(row: MethodRow, run: TrialResult) -> MethodRow:
    if run.problem:
        return replace(row, refused=run.problem, sent_bytes=None, step_seconds=None)
    return replace(row, sent_bytes=run.curve[-1][1] / run.steps, step_seconds=run.step_seconds, loss=run.loss)

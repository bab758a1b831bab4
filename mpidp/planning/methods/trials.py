"""`python -m mpidp.plan methods`: what computing takes here, how fast the link is, and each method really trained for a while.

Runs live in a folder of their own beside run.dir, which all nodes see, and are gone afterwards. Nothing is said meanwhile but one
line a method, on standard error.
"""

from __future__ import annotations

import json
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

from mpidp.checkup import network
from mpidp.config.schema import Config
from mpidp.data.index import read_index
from mpidp.errors import MpidpError, Stopped, UsageError
from mpidp.parallel.grid import make_grid
from mpidp.planning.methods.predict import Row, predict, recommend, variant, with_speeds
from mpidp.planning.methods.traffic import Cluster, cluster_of, lanes_of, link_of
from mpidp.planning.ranks.predict import most_micro_batches
from mpidp.runtime.device import resolve_threads
from mpidp.runtime.environment import tolerant
from mpidp.runtime.topology import make_mesh
from mpidp.runtime.world import polite_barrier, together
from mpidp.training import build, loop
from mpidp.training.attempts import listen
from mpidp.training.initial_weights import open_origin
from mpidp.training.run_plan import plan

if TYPE_CHECKING:
    from mpi4py import MPI

TIMED = 6  # steps of which the last half is timed
PILOT = 0.2  # of a method's time, to learn what its steps take


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    ranks: int = 0  # 0: those of the launch, else those that cluster.json saw
    cluster: str = ""  # cluster.json
    link: str = ""  # MBIT,MS
    step_seconds: float = 0.0  # of computing; 0: measure
    seconds: float = 0.0  # of each trial; 0: none
    methods: tuple[str, ...] = ()  # none: all


@dataclass
class Tried:
    """A run of a method, as rank 0 tells of it."""

    problem: str = ""
    loss: float = 0.0
    loss_name: str = ""
    curve: list[tuple[float, int, float]] = field(default_factory=list)  # (seconds, bytes sent, train_loss) after each step

    @property
    def steps(self) -> int:
        return len(self.curve)

    @property
    def step_seconds(self) -> float:
        """Without the first two, which warm up."""
        begin = min(2, self.steps - 1)
        return (self.curve[-1][0] - (self.curve[begin - 1][0] if begin else 0.0)) / (self.steps - begin)


def answer(config: Config, options: Options, world: MPI.Intracomm) -> dict[str, Any]:
    """What is printed, as plain values; the same on every rank. UsageError, DataError. Collective over world."""
    if options.seconds and world.size == 1:
        raise UsageError("--run trains on the ranks of this launch, and there is one: mpirun -np N python -m mpidp.plan ...")
    if options.seconds and options.ranks not in (0, world.size):
        raise UsageError.on_every_rank(f"--ranks={options.ranks}, but --run trains on the {world.size} ranks of this launch")
    if options.seconds and tolerant():
        raise UsageError.on_every_rank(
            "--run trains one method after the other, and where jobs outlive their ranks the memory of a run is kept to the end: "
            "start without --with-ft ulfm"
        )
    origin = open_origin(config, world)
    with together(world):
        config = config if origin is None else origin.completed(config)
    cluster, where = find_cluster(config, options, world)
    with together(world):
        vocab_size = read_index(Path(config.data.path)).vocab_size
        lanes = lanes_of(config)
        if cluster.ranks > lanes.num_lanes:
            raise UsageError(
                f"{cluster.ranks} ranks, but the global batch has {lanes.num_lanes} lanes: fewer --ranks, or a larger "
                "train.global_batch"
            )
    compute = options.step_seconds or compute_seconds(config, most_micro_batches(lanes, cluster.ranks), world)
    foretold = predict(config, vocab_size, cluster, compute, options.methods)
    rows, runs = foretold, dict[str, Tried]()
    if options.seconds:
        runs = try_all(config, foretold, options.seconds, world)
        rows = with_speeds([_measured(row, runs[row.method]) if row.method in runs else row for row in foretold])
    best, why = recommend(rows, bool(options.seconds))
    return {
        **asdict(cluster), "link_from": where, "compute_seconds": compute, "compute_given": bool(options.step_seconds),
        "tried_seconds": options.seconds, "loss_name": next((run.loss_name for run in runs.values() if not run.problem), ""),
        "foretold": [asdict(row) for row in foretold], "rows": [asdict(row) for row in rows],
        "took_seconds": {name: run.curve[-1][0] for name, run in runs.items() if run.curve},
        "curves": {name: run.curve for name, run in runs.items() if run.curve}, "recommended": best, "why": why,
    }  # fmt: skip


def find_cluster(config: Config, options: Options, world: MPI.Intracomm) -> tuple[Cluster, str]:
    """The ranks and the link between them, and who says so: --link, cluster.json, or a measurement among the ranks of this
    launch. UsageError when nobody does. Collective over world."""
    ranks = options.ranks or (world.size if world.size > 1 else 0)
    if options.link:
        if not ranks:
            raise UsageError("--link says nothing of how many ranks there are: give --ranks, too")
        return link_of(options.link, ranks), f"--link={options.link}"
    places = [Path(options.cluster)] if options.cluster else [Path(config.run.dir) / "cluster.json", Path("cluster.json")]
    found: tuple[str, str] | None = None
    with together(world):
        if world.rank == 0:
            found = next(((str(place), place.read_text(errors="replace")) for place in places if place.is_file()), None)
            if options.cluster and found is None:
                raise UsageError(f"--cluster={options.cluster}: no such file; `mpirun -np N python -m mpidp.doctor` writes one")
    found = world.bcast(found, root=0)
    if found is not None:
        with together(world):
            try:
                said = json.loads(found[1])
            except ValueError as error:
                raise UsageError(f"{found[0]} is not JSON ({error}): let the doctor write it anew") from error
            cluster = cluster_of(said if isinstance(said, dict) else {}, ranks, found[0])
        return cluster, found[0]
    if world.size == 1:
        raise UsageError(
            "no cluster.json says how fast ranks talk: run `mpirun -np N python -m mpidp.doctor` on the job's nodes and name its "
            "file by --cluster, give --link=MBIT,MS, or start this under mpirun"
        )
    mesh = make_mesh(world)
    hosts = [host for host, size in zip(mesh.hosts, mesh.node_sizes, strict=True) for _ in range(size)]
    link = network.summary(network.measure(mesh.dp, hosts, thorough=False))
    about = {**link, "ranks": world.size, "ranks_per_node": mesh.node_sizes}
    return cluster_of(about, ranks, "this launch"), "measured just now"


def compute_seconds(config: Config, micro_batches: int, world: MPI.Intracomm) -> float:
    """Of a step of so many micro-batches on one rank by itself, while all ranks of this launch do the same: the slowest rank's.
    Collective over world."""
    from mpi4py import MPI

    threads = resolve_threads(config.train.threads, make_mesh(world))
    alone = variant(config, "synchronous").with_values(
        train={"global_batch": config.train.micro_batch * micro_batches, "lanes": 0, "threads": threads},
        comm={"reducer": "auto"},
    )
    mine = 0.0
    with together(world), tempfile.TemporaryDirectory(prefix="mpidp-plan-") as folder:
        run = trial(alone, TIMED, Path(folder) / "run", MPI.COMM_SELF)
        if run.problem:
            raise UsageError(run.problem)
        times = [point[0] for point in run.curve]
        steps = [late - early for early, late in zip(times, times[1:], strict=False)]
        mine = statistics.median(steps[TIMED // 2 - 1 :])
    return max(world.allgather(mine))


@contextmanager
def folder_beside(run_dir: Path, world: MPI.Intracomm) -> Iterator[Path]:
    """On the disk that all nodes see; gone afterwards. Collective over world."""
    made = ""
    with together(world):
        if world.rank == 0:
            try:
                run_dir.parent.mkdir(parents=True, exist_ok=True)
                made = tempfile.mkdtemp(prefix=".methods-", dir=run_dir.parent)
            except OSError as error:
                raise UsageError(f"run.dir={run_dir}: nothing can be written beside it ({error})") from error
    made = world.bcast(made, root=0)
    try:
        yield Path(made)
    finally:
        if world.rank == 0:
            shutil.rmtree(made, ignore_errors=True)


def try_all(config: Config, rows: list[Row], seconds: float, world: MPI.Intracomm) -> dict[str, Tried]:
    """Each method that was not refused, for about so many seconds of steps: first a part of them as foretold, then as many as fit
    by what those took. Collective over world."""
    found: dict[str, Tried] = {}
    with folder_beside(Path(config.run.dir), world) as folder:
        for row in rows:
            if row.refused or not row.step_seconds:
                continue
            chosen = variant(config, row.method)
            found[row.method] = run = trial(chosen, _steps(PILOT * seconds, row.step_seconds), folder / "pilot", world)
            if not run.problem:
                found[row.method] = run = trial(chosen, _steps(seconds, run.step_seconds), folder / "run", world)
            if world.rank == 0:
                words = run.problem or f"{run.loss_name} {run.loss:.4f} after {run.steps} steps"
                print(f"{row.method}: {words}", file=sys.stderr, flush=True)
    return found


def _steps(seconds: float, each: float) -> int:
    return max(4, round(seconds / each))


def trial(config: Config, steps: int, run_dir: Path, world: MPI.Intracomm) -> Tried:
    """So many steps from the run's own start, at a learning rate that stays where its warm-up ends; the same on every rank.
    Collective over world."""
    config = config.with_values(
        train={"steps": steps, "tokens": 0, "epochs": 0.0, "eval_every": 0, "save_every": 0, "target_loss": 0.0, "patience": 0},
        optim={"schedule": "constant", "warmup_steps": -1}, run={"dir": str(run_dir), "resume": "never"},
    )
    with together(world):
        if world.rank == 0:
            run_dir.mkdir()
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            job = build.build(plan(config, make_grid(world)))
            end = loop.run_to_end(job, listen(job, None), [])
    except Stopped as stop:
        raise Stopped.on_every_rank("stopped on request; nothing of the trials is kept") from stop
    except MpidpError as error:
        if not error.everywhere and world.size > 1:
            raise
        if world.rank == 0:
            shutil.rmtree(run_dir, ignore_errors=True)
        polite_barrier(world)
        return Tried(problem=str(error))
    told: Tried | None = None
    with together(world):
        if world.rank == 0:
            told = _read(run_dir / "metrics.jsonl", end["val_loss"])
            shutil.rmtree(run_dir)
    polite_barrier(world)
    return world.bcast(told, root=0)


def _read(metrics: Path, val_loss: float | None) -> Tried:
    """The loss is the last val_loss, or without one the mean train_loss of the last quarter. Independent."""
    lines = [line for line in map(json.loads, metrics.read_text().splitlines()) if "step_seconds" in line]
    seconds, sent, curve = 0.0, 0, list[tuple[float, int, float]]()
    for line in lines:
        seconds, sent = seconds + line["step_seconds"], sent + line["comm_bytes"]
        curve.append((seconds, sent, line["train_loss"]))
    if not curve or any(loss is None for _, _, loss in curve) or not math.isfinite(val_loss or 0.0):
        return Tried(problem="its loss was not finite, or no step made an update")
    if val_loss is not None:
        return Tried("", val_loss, "val_loss", curve)
    return Tried("", statistics.mean(loss for _, _, loss in curve[-max(1, len(curve) // 4) :]), "train_loss", curve)


def _measured(row: Row, run: Tried) -> Row:
    if run.problem:
        return replace(row, refused=run.problem, sent_bytes=None, step_seconds=None)
    return replace(row, sent_bytes=run.curve[-1][1] / run.steps, step_seconds=run.step_seconds, loss=run.loss)

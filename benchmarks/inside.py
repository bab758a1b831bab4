"""Shared code of benchmarks that train several variants within one mpirun: makes the corpus, models by size and jobs, and
alternates steps."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

import mpidp.runtime.command  # noqa: F401  (sets environment variables that MPI and BLAS read)
from data_tools.prepare import prepare
from mpidp.config.schema import Config, checked
from mpidp.data.loader import Batch
from mpidp.parallel.grid import make_grid
from mpidp.runtime.world import polite_barrier
from mpidp.training.build import build
from mpidp.training.job import Job
from mpidp.training.run_plan import plan
from mpidp.training.step import compute
from mpidp.training.step_report import exchange_reports

WORLD = MPI.COMM_WORLD
MODELS = {  # by approximate number of parameters with a byte vocabulary
    "1M": {"num_layers": 4, "num_heads": 4, "model_dim": 128},
    "14M": {"num_layers": 8, "num_heads": 6, "model_dim": 384, "hidden_dim": 1024},
    "50M": {"num_layers": 10, "num_heads": 10, "model_dim": 640, "hidden_dim": 1728},
}


def corpus() -> tuple[Path, Path]:
    """Return (a temporary folder, shards in it), created by rank 0. Collective over WORLD."""
    folder = Path(WORLD.bcast(tempfile.mkdtemp(prefix="mpidp-bench-") if WORLD.rank == 0 else None))
    if WORLD.rank == 0:
        source = folder / "text.txt"
        source.write_text("".join(p.read_text() for p in sorted((Path(__file__).parents[1] / "mpidp").rglob("*.py"))))
        prepare(str(source), "byte", folder / "shards", shards=1, val_fraction=0.1, verbose=False)
    WORLD.Barrier()
    return folder, folder / "shards"


def config_of(folder: Path, model: str, global_batch: int, micro_batch: int, seq_len: int, **sections: dict[str, Any]) -> Config:
    """Return the settings of a run without evaluations and checkpoints. Independent."""
    return checked(Config().with_values(
        data={"path": str(folder / "shards")}, run={"dir": str(folder / "run"), "hang_seconds": 0.0},
        model=MODELS[model] | {"seq_len": seq_len},
    ).with_values(
        train={"steps": 1000, "global_batch": global_batch, "micro_batch": micro_batch, "threads": 1, "device": "cpu"}
        | sections.pop("train", {}), **sections,
    ))


class Stepper:
    """Repeats the training step of one job on one batch."""

    def __init__(self, comm: MPI.Intracomm, config: Config) -> None:
        """Each Stepper writes its files to a separate folder in config.run.dir. Collective over comm."""
        Path(config.run.dir).mkdir(parents=True, exist_ok=True)
        own = comm.bcast(tempfile.mkdtemp(dir=config.run.dir) if comm.rank == 0 else None)
        config = config.with_values(run={"dir": own})
        self.comm, self.threads = comm, config.train.threads
        self.job: Job = build(plan(config, make_grid(comm, config.mesh.tp, config.mesh.pp)))
        loader = self.job.open_loader(0)
        self.batch: Batch = next(loader)
        loader.close()

    def __call__(self) -> None:
        torch.set_num_threads(self.threads)
        done = compute(self.job, self.batch)
        report = exchange_reports(self.job, done, 0.0, False)
        self.job.strategy.step(1e-3, report.tokens)


def in_turns(variants: dict[str, Callable[[], None] | None], repeats: int, skip: int = 2) -> dict[str, list[float]]:
    """Return the seconds of each variant's step on the slowest rank. Variants run in turn in every repeat. A variant is None on
    ranks that do not take part. These ranks sleep. Collective over WORLD."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + skip):
        for name, step in variants.items():
            WORLD.Barrier()
            began = time.perf_counter()
            if step is not None:
                step()
            spent = time.perf_counter() - began if step is not None else 0.0
            polite_barrier(WORLD)
            slowest = WORLD.allreduce(spent, op=MPI.MAX)
            if repeat >= skip:
                found[name].append(slowest)
    return found


def medians(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in found.items()}


def ratio(found: dict[str, list[float]], name: str, base: str) -> float:
    """Return the median over repeats of (time of name / time of base in the same repeat)."""
    return statistics.median(a / b for a, b in zip(found[name], found[base], strict=True))

"""Everything the training loop needs, as plain values and parts; and where a run stands."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpidp.audit import Audit
from mpidp.balance import Balance
from mpidp.comm.grid import Grid
from mpidp.comm.mesh import Mesh
from mpidp.comm.transport import Messages
from mpidp.comm.waiting import Wait
from mpidp.data.loader import Loader
from mpidp.data.shards import TokenStream
from mpidp.energy import Meter
from mpidp.engine import Engine
from mpidp.inject import Faults
from mpidp.lanes import Lanes
from mpidp.metrics import Clock, MetricsFile, Progress
from mpidp.noise import NoiseAverage
from mpidp.optim import Schedule
from mpidp.parts import Parts
from mpidp.rundir import RunLock
from mpidp.saver import Saver
from mpidp.scalars import Scalars
from mpidp.stopping import StopRequest
from mpidp.strategies.protocol import StepStats, Strategy
from mpidp.timeline import Timeline
from mpidp.watchdog import Watchdog

REMEMBERED = 32  # gradient norms, of which the usual one is the median
KNOWN_AFTER = 20  # updates


@dataclass
class Position:
    """Where a run stands; all of it goes into the checkpoint."""

    step: int = 0  # updates made
    skipped: int = 0  # batches that made no update
    skipped_in_a_row: int = 0
    tokens: int = 0  # target tokens learned from
    val_loss: float | None = None
    best_val_loss: float | None = None
    evaluations_since_best: int = 0
    evaluated_step: int = 0  # at which val_loss was measured
    noise: NoiseAverage = field(default_factory=NoiseAverage)
    norms: list[float] = field(default_factory=list)  # of the gradients of the last updates

    def __post_init__(self) -> None:
        if isinstance(self.noise, dict):  # as a checkpoint keeps it
            self.noise = NoiseAverage(**self.noise)

    @property
    def batch(self) -> int:
        """The next batch: the loader's whole state."""
        return self.step + self.skipped

    def norm_limit(self, spike: float) -> float:
        """The gradient norm beyond which a batch makes no update: `spike` times the median of the last ones, which a few odd ones
        do not move and which is the same bits on any machine. None at first, and when spike is 0. Independent."""
        return spike * statistics.median_low(self.norms) if spike and len(self.norms) >= KNOWN_AFTER else math.inf

    def count(self, stats: StepStats, tokens: int) -> None:
        """A batch is behind; tokens: its target tokens. Independent."""
        if stats.skipped:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        else:
            self.step, self.tokens, self.skipped_in_a_row = self.step + 1, self.tokens + tokens, 0
            self.norms = [*self.norms, *filter(None, [stats.grad_norm])][-REMEMBERED:]

    def go_on_with(self, batch: int) -> None:
        """Pass over the batches before this one. Independent."""
        self.skipped, self.skipped_in_a_row = batch - self.step, 0


@dataclass
class Job:
    """Everything the loop needs, as plain values and parts."""

    comm: MPI.Intracomm
    mesh: Mesh  # the replicas of this rank's part of the model
    grid: Grid
    parts: Parts
    engine: Engine
    strategy: Strategy
    saver: Saver
    open_loader: Callable[[int], Loader]  # from a batch number
    lanes: Lanes
    balance: Balance
    wait: Wait
    audit: Audit
    noise_every: int
    faults: Faults  # on purpose, on this rank
    schedule: Schedule
    transport: Messages
    validation: TokenStream | None
    run_dir: Path
    meta: dict[str, Any]  # what checkpoints say of the run: config, fingerprint, data
    seq_len: int
    eval_every: int
    eval_tokens: int
    target_loss: float
    patience: int
    spike: float
    max_skipped: int
    stop_early_seconds: float  # before the job's time limit
    progress: Progress
    watchdog: Watchdog
    mfu: Callable[[float], float | None]  # of tokens a second
    facts: dict[str, Any]  # what the `start` line says of who runs where, and on what
    meter: Meter
    open_scalars: Callable[[int], Scalars | None]  # that go on after this step; on rank 0, where they are wanted
    position: Position = field(default_factory=Position)
    passed_over_at: int = -1  # the step of the checkpoint from which batches were passed over last
    metrics: MetricsFile | None = None  # on rank 0, while it runs
    lock: RunLock | None = None  # on rank 0
    clock: Clock = field(default_factory=Clock)
    timeline: Timeline = field(default_factory=Timeline)
    lines: list[dict[str, Any]] = field(default_factory=list)  # recorded since the last update, on every rank
    min_ranks: int = 1  # to go on with when others have died
    went_on: bool = False  # ranks have died, and this job goes on with the state of the one before
    stop_at: float = math.inf  # seconds since 1970: before the job's time limit
    stop: StopRequest | None = None  # while it runs
    untold: np.ndarray | None = None  # what this rank computed since the ranks met last (step.py)

    def record(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl, and when. Independent."""
        line = line | {"unix_seconds": round(time.time(), 3)}
        self.lines.append(line)
        if self.metrics is not None:
            self.metrics.write(line)

    def gpu_memory(self) -> dict[str, list[int]]:
        """On CUDA, the bytes that torch had allocated at most, by rank. Collective over comm."""
        peak = self.engine.peak_bytes()
        return {} if peak is None else {"gpu_peak_bytes": self.comm.allgather(peak)}

    def enter(self, phase: str) -> None:
        """What this rank does from here on: the watchdog is told, and faults on purpose strike. Independent."""
        step = self.position.step + 1
        self.watchdog.enter(step, phase)
        self.faults.strike(step, phase)

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[], float]]:
        """A phase of the step, timed; gives a function that says how many seconds it has been. Independent."""
        self.enter(name)
        with self.clock.timed(name) as spent:
            yield spent

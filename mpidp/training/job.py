"""Everything the training loop needs, as plain values and parts; and where a run stands."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpidp.checkpoint.saver import Saver
from mpidp.comm.transport import Messages
from mpidp.comm.waiting import Wait
from mpidp.data.lanes import Lanes
from mpidp.data.loader import Loader
from mpidp.data.shards import TokenStream
from mpidp.faults.audit import Audit
from mpidp.faults.inject import InjectedFaults
from mpidp.faults.run_lock import RunLock
from mpidp.faults.stop import StopRequest
from mpidp.faults.watchdog import Watchdog
from mpidp.metrics.clock import Clock
from mpidp.metrics.energy import Meter
from mpidp.metrics.jsonl import MetricsFile
from mpidp.metrics.progress import Progress
from mpidp.metrics.tensorboard import Scalars
from mpidp.metrics.timeline import Timeline
from mpidp.parallel.engine import Engine
from mpidp.parallel.grid import Grid
from mpidp.parallel.model_part import ModelPartition
from mpidp.runtime.topology import Topology
from mpidp.strategies.protocol import Strategy
from mpidp.training.balance import Balance
from mpidp.training.lr_schedule import Schedule
from mpidp.training.state import Position


@dataclass
class Job:
    """Everything the loop needs, as plain values and parts."""

    comm: MPI.Intracomm
    mesh: Topology  # the replicas of this rank's part of the model
    grid: Grid
    parts: ModelPartition
    engine: Engine
    strategy: Strategy
    saver: Saver
    open_loader: Callable[[int], Loader]  # from a batch number
    lanes: Lanes
    balance: Balance
    wait: Wait
    audit: Audit
    noise_every: int
    faults: InjectedFaults  # on purpose, on this rank
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
        self.faults.trigger(step, phase)

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[], float]]:
        """A phase of the step, timed; gives a function that says how many seconds it has been. Independent."""
        self.enter(name)
        with self.clock.timed(name) as spent:
            yield spent

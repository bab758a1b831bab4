"""Everything the training loop needs, as plain values and parts; and where a run stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpi4py import MPI

from mpidp.audit import Audit
from mpidp.balance import Balance
from mpidp.comm.transport import Messages
from mpidp.comm.waiting import Wait
from mpidp.data.loader import Loader
from mpidp.data.shards import TokenStream
from mpidp.engine import Engine
from mpidp.inject import Faults
from mpidp.lanes import Lanes
from mpidp.metrics import MetricsFile, Progress
from mpidp.noise import NoiseAverage
from mpidp.optim import Schedule
from mpidp.strategies.protocol import Strategy
from mpidp.watchdog import Watchdog


@dataclass
class Position:
    """Where a run stands; all of it goes into the checkpoint."""

    step: int = 0  # updates made
    skipped: int = 0  # batches whose gradient was not finite
    skipped_in_a_row: int = 0
    tokens: int = 0  # target tokens learned from
    val_loss: float | None = None
    best_val_loss: float | None = None
    evaluations_since_best: int = 0
    noise: NoiseAverage = field(default_factory=NoiseAverage)

    def __post_init__(self) -> None:
        if isinstance(self.noise, dict):  # as a checkpoint keeps it
            self.noise = NoiseAverage(**self.noise)

    @property
    def batch(self) -> int:
        """The next batch: the loader's whole state."""
        return self.step + self.skipped


@dataclass
class Job:
    """Everything the loop needs, as plain values and parts."""

    comm: MPI.Intracomm
    engine: Engine
    strategy: Strategy
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
    save_every: int
    keep: int
    target_loss: float
    patience: int
    max_skipped: int
    progress: Progress
    watchdog: Watchdog
    mfu: Callable[[float], float | None]  # of tokens a second
    position: Position = field(default_factory=Position)
    saved_step: int = -1  # the newest checkpoint's
    metrics: MetricsFile | None = None  # on rank 0, while it runs

    def record(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl. Independent."""
        if self.metrics is not None:
            self.metrics.write(line)

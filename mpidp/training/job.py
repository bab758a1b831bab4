"""Defines the class Job, which has everything that the training loop needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mpi4py import MPI

from mpidp.checkpoint.saver import Saver
from mpidp.comm.transport import Messages
from mpidp.config.schema import Config
from mpidp.data.lanes import Lanes
from mpidp.data.loader import Loader
from mpidp.faults.audit import Audit
from mpidp.parallel.engine import Engine
from mpidp.parallel.grid import Grid
from mpidp.parallel.model_part import ModelPartition
from mpidp.runtime.topology import Topology
from mpidp.strategies.protocol import Strategy
from mpidp.training.balance import Balance
from mpidp.training.data_parallel import DataParallelMemory
from mpidp.training.lr_schedule import Schedule
from mpidp.training.run_plan import RunPlan
from mpidp.training.run_record import RunRecord
from mpidp.training.services import Services
from mpidp.training.state import Position, RunState
from mpidp.training.task_evaluation import TaskEvaluation


@dataclass(frozen=True)
class Job:
    """The objects that a training run needs. build.build() makes them."""

    plan: RunPlan
    parts: ModelPartition  # the part of the model that this rank holds
    engine: Engine
    strategy: Strategy
    memory: DataParallelMemory  # shared memory, the lanes of each rank, and the reducer
    transport: Messages
    audit: Audit
    schedule: Schedule
    saver: Saver
    services: Services
    record: RunRecord
    state: RunState
    tasks: TaskEvaluation | None = None  # evaluates the tasks in train.eval_tasks

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def comm(self) -> MPI.Intracomm:
        """All ranks."""
        return self.plan.world

    @property
    def grid(self) -> Grid:
        return self.plan.grid

    @property
    def mesh(self) -> Topology:
        """The ranks that hold the same part of the model, one rank of each replica."""
        return self.plan.mesh

    @property
    def lanes(self) -> Lanes:
        return self.plan.lanes

    @property
    def balance(self) -> Balance:
        return self.memory.balance

    @property
    def position(self) -> Position:
        return self.state.position

    @property
    def run_dir(self) -> Path:
        return self.plan.run_dir

    def micro_batches(self) -> list[int]:
        """Return the indices of the micro-batches that this rank computes, in order (see DataParallelMemory.micro_batches()).
        Independent."""
        return self.memory.micro_batches(self.mesh.dp.rank)

    def open_loader(self, batch: int) -> Loader:
        """Return a loader of this rank's micro-batches. `batch`: the number of the first global batch. Independent."""
        plan = self.plan
        for stream in filter(None, (plan.training, plan.validation)):  # waiting for a server does not count as a hang
            stream.storage.report_waits(self.services.observers.progressed)
        resident = self.config.data.resident
        return Loader(plan.training, plan.sampler, self.micro_batches(), plan.device, batch, resident=resident)

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[], float]]:
        """Run the body of a `with` statement as phase `name` of the step, and measure its time. Yield a function that returns the
        seconds since the start of the phase. Independent."""
        self.services.observers.enter(name)
        with self.services.clock.timed(name) as seconds:
            yield seconds


def ended(job: Job) -> str:
    """Return the reason why the run is over: steps, target_loss or patience. Return "" if it is not over. The result is the same
    on every rank. Independent."""
    at, train = job.position, job.config.train
    if at.step >= train.steps:
        return "steps"
    if train.target_loss and at.val_loss is not None and at.val_loss <= train.target_loss:
        return "target_loss"
    return "patience" if train.patience and at.evaluations_since_best >= train.patience else ""


def lacks_ranks(job: Job) -> bool:
    """Return whether ranks have failed and fewer than faults.min_ranks are left. The result is the same on every rank.
    Independent."""
    return job.comm.size < min(job.config.faults.min_ranks, job.state.full)

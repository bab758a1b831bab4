"""The services of a job: watchdog, injected faults, timeline, clock, progress output, and energy meter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI

from mpidp.checkpoint.mirror import Mirror
from mpidp.comm.waiting import main_thread_waits
from mpidp.config.rules import steps_of
from mpidp.faults.heartbeat import open_heartbeat_board
from mpidp.faults.inject import InjectedFaults
from mpidp.faults.run_lock import RunLock
from mpidp.faults.watchdog import Watchdog
from mpidp.metrics.clock import Clock
from mpidp.metrics.energy import Meter, common_counters, open_meter
from mpidp.metrics.progress import Progress
from mpidp.metrics.timeline import Timeline
from mpidp.runtime.observers import StepObserver, StepObservers
from mpidp.training.run_plan import RunPlan
from mpidp.training.state import RunState


@dataclass
class Services:
    """The objects that watch, measure and test a job."""

    faults: InjectedFaults  # faults injected on this rank
    watchdog: Watchdog
    timeline: Timeline
    observers: StepObservers  # notifies the faults, the watchdog and the timeline
    clock: Clock
    progress: Progress
    meter: Meter
    machines: dict[str, Any]  # facts for the `start` line: number of devices, and what the meter measures
    lock: RunLock | None = None  # on rank 0; the command holds the lock
    mirror: Mirror | None = None  # on rank 0, if run.mirror is set

    def close(self) -> None:
        """Stop measuring energy, and close the progress bar. Independent."""
        self.meter.close()
        self.progress.close()


def make_services(
    plan: RunPlan, state: RunState, faults: InjectedFaults, lock: RunLock | None, on_hang: Callable[[str], None],
    more: Sequence[StepObserver] = (), mirror: Mirror | None = None,
) -> Services:
    """Make the services of a job. `on_hang`: a function that is called with the report if the job hangs. `more`: additional
    observers of every step. Collective over plan.world."""
    config, world, host = plan.config, plan.world, plan.grid.everyone.host
    board = open_heartbeat_board(world, host, plan.run_dir) if config.run.hang_seconds else None
    # With one rank os._exit is sufficient. With several ranks mpirun takes the exit code from MPI_Abort.
    abort: dict[str, Any] = {"abort": world.Abort} if world.size > 1 else {}
    first_times = 10.0 if config.train.compile else 3.0
    watchdog = Watchdog(board, config.run.hang_seconds, first_times, on_hang=on_hang, waits=main_thread_waits, **abort)
    first_last = steps_of(config.metrics.timeline)
    timeline = Timeline(first_last, plan.run_dir, host.partition("#")[0], config.metrics.kernels)
    observers = StepObservers([watchdog, faults, timeline, *more], lambda: state.position.step)
    meter, machines = watch_energy(config.metrics.energy, host, plan.device, world)
    progress = Progress(config.train.steps, world.rank == 0)
    return Services(faults, watchdog, timeline, observers, Clock(observers), progress, meter, machines, lock, mirror)


def watch_energy(wanted: bool, host: str, device: torch.device, world: MPI.Intracomm) -> tuple[Meter, dict[str, Any]]:
    """Return (this rank's energy meter, fields for the `start` line). The field `devices` is the number of devices.
    The field `energy_of` lists what is measured on all machines. The field `energy_not` says why other counters are missing.
    `wanted`: the setting metrics.energy. `host`: this rank's host name. Only the first rank of each machine reads the
    counters. Collective over world."""
    cuda = device.type == "cuda"
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if cuda else ""
    machine = host.partition("#")[0]
    rows = world.allgather((machine, str(device) if cuda else host, uuid))
    reads = [row[0] for row in rows].index(machine) == world.rank
    meter, found = open_meter(wanted, reads, sorted({row[2] for row in rows if row[0] == machine and row[2]}))
    measured, why = common_counters(world.allgather(found))
    return meter, {"devices": len({row[:2] for row in rows}), "energy_of": measured, "energy_not": why}

"""The course of a run from its plan to its end: attempts, each of which trains until the end, a death or damage; then the next
begins where the state is: in the memory of those who are left, else in the last checkpoint.

`train.run` walks it. All state between attempts is here; what is done to it is in recovery.py (who goes on, and with what) and
loop.py (training).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidp.checkpoint.resume import find_checkpoint
from mpidp.config.rules import method_setting
from mpidp.config.schema import Config
from mpidp.errors import Damaged
from mpidp.faults.inject import InjectedFaults, faults_from_environment
from mpidp.faults.restarts import RestartLog
from mpidp.faults.run_lock import RunLock
from mpidp.runtime.ulfm import RankFailure, commit
from mpidp.runtime.world import raise_together
from mpidp.training import loop, recovery
from mpidp.training.build import build
from mpidp.training.checkpoints import restore
from mpidp.training.job import Job
from mpidp.training.recovery import Crew
from mpidp.training.run_plan import Plan

if TYPE_CHECKING:
    from mpi4py import MPI

MOST_RETURNS = 3  # to the last checkpoint, in one command: a machine that fails more often is to be mended


class Course:
    """One rank's part in it; all ranks take the same turns."""

    def __init__(self, config: Config, plan: Plan | None, world: MPI.Intracomm, crew: Crew | None) -> None:
        """plan: of those who start the run; newcomers have none yet, but a crew that they join. Collective over world."""
        self.config, self.plan, self.world = config, plan, world
        self.run_dir = Path(config.run.dir)
        self.growing = crew is not None  # newcomers may be the first of several
        self.tries = RestartLog(self.run_dir, begun=self.growing)
        self.lock: RunLock | None = None
        self.job: Job | None = None  # with which those go on who are left when ranks have died
        self._next_batch = 0  # after a rollback
        self._untold: list[dict[str, Any]] = []  # events that led to the job
        self._failed_at = 0.0
        if crew is None:
            assert plan is not None
            self.number = world.rank
            with raise_together(world):
                self.faults: InjectedFaults = faults_from_environment(self.number)
                self.lock = RunLock(self.run_dir) if world.rank == 0 else None
            self.crew = Crew(plan.config, plan.asked_threads, world.size, world.size, config.faults.respawn)
        else:
            self.crew, self.number, crew.number = crew, crew.number, crew.number + 1
            crew.events.append({"event": "went_back", "why": "all who held the run's state have died"})  # for when they do
            self.faults = faults_from_environment(self.number)

    def attempt(self) -> dict[str, Any] | None:
        """Gather, take up the state, train: the end record; None when the job is to grow first. Damaged, RankFailure. Collective
        over world."""
        self._gather()
        assert self.plan is not None
        with commit(self.world):
            if (ended := self._take_up(self.plan)) is not None:
                return ended
        assert self.job is not None
        if recovery.wanting(self.crew, self.job):
            self.growing = True
            return None
        self.job.lock, self.job.watchdog.last_words = self.lock, self.tries.failed
        told, self._untold, self._failed_at = self._untold, [], 0.0
        with commit(self.world):
            end = loop.run_to_end(self.job, False, told)
        self.tries.ended(None, self.world.rank)
        return end

    def _gather(self) -> None:
        """World as large as it is to be, and the plan for it."""
        while self.growing and self.crew.lacks(self.world.size):
            self.world = recovery.one_more(self.world, self.crew, self.job)
        self.growing = False
        with commit(self.world):
            if self.plan is None or self.world is not self.plan.world:
                self.plan = recovery.regroup(self.plan, self.world, self.crew, self.number)
        self.world = self.plan.world

    def _take_up(self, plan: Plan) -> dict[str, Any] | None:
        """The job of all who are here, with the run's state from wherever it is; the end record of a run that is over."""
        with raise_together(self.world):
            if self.world.rank == 0 and self.lock is None:
                self.lock = RunLock(self.run_dir, ours=True)
        held = self.world.allgather(self.job is not None)
        if self.job is not None and self.job.comm is self.world:
            return None  # nobody came
        if not any(held):
            return self._from_disk(plan)
        if self.job is not None and all(held):
            self.job, event = recovery.rebuild(plan, self.faults, self.job, self._failed_at)
        else:
            self.job, event = recovery.hand_over(plan, self.faults, self.job, self._failed_at)
        self._untold = [*self._untold, event]
        return None

    def _from_disk(self, plan: Plan) -> dict[str, Any] | None:
        """The job as the last checkpoint has it, or at its beginning; or the end record of a run that is over."""
        run, events = plan.config.run, self.crew.events
        reader, notes = find_checkpoint(Path(run.dir), "auto" if events else run.resume, self.world)
        plan = plan.adopt(reader, notes)
        if reader is not None and (end := plan.has_ended(reader)) is not None:
            plan.say_ended(end)
            return end
        with raise_together(self.world):
            if not events:
                self.tries.begin(reader.meta["step"] if reader is not None else -1, run.tries, self.world.rank)
        with commit(self.world):
            job = build(plan, self.faults)
            if reader is not None:
                restore(job, reader)
        if reader is not None and self._next_batch:
            job.position.go_on_with(self._next_batch)
            job.passed_over_at = job.position.step
        self.job, self._untold = job, [*([{"event": "resume"}] if reader is not None else []), *events[-1:]]
        return None

    def go_back(self, damage: Damaged) -> None:
        """The state is no good: the next attempt begins at the last checkpoint, after a spike beyond its batches. `damage` itself
        when that was tried often enough. Independent."""
        self._next_batch, self.job = damage.next_batch, None
        self.crew.returns += not self._next_batch
        if self.crew.returns > MOST_RETURNS:
            raise damage
        past = {"event": "rolled_back", "batch": damage.next_batch - 1} if damage.next_batch else {"event": "went_back"}
        self.crew.events.append(past | {"why": str(damage)})

    def leave_the_dead(self, failure: RankFailure) -> None:
        """Ranks have died: the next attempt is of those who are left. Collective over them."""
        self._failed_at, self.growing = self._failed_at or time.monotonic(), False
        self.world = recovery.those_left(self.world, str(failure))
        if self.job is not None and not self.job.strategy.survives_failures:
            recovery.abandon(self.job)
            self.job, self._failed_at = None, 0.0
            method = method_setting(self.config.strategy.name, self.config.strategy.quorum)
            why = f"ranks died, and {method} cannot go on in the middle of a step"
            self.crew.events.append({"event": "went_back", "why": why})

    def close(self, error: BaseException | None) -> None:
        """Tell why it ended, where it did not end well, unless another job has the folder by now. Independent."""
        if error is not None and (self.lock is None or self.lock.held()):
            self.tries.ended(error, self.world.rank)
        if self.lock is not None:
            self.lock.release()

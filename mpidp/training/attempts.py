"""The attempts of a run. An attempt trains until the run ends, ranks fail, or the state is found to be damaged. The next attempt
continues with the state in the memory of the surviving ranks, or from the last checkpoint.

`train.run` repeats attempts. RunAttempts holds the state between attempts. recovery.py decides which ranks continue, and with
which state.
"""

from __future__ import annotations

import math
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidp.checkpoint.mirror import Mirror, open_mirror
from mpidp.checkpoint.resume import find_checkpoint
from mpidp.config.rules import method_setting
from mpidp.config.schema import Config
from mpidp.errors import Damaged, MpidpError, Stopped
from mpidp.faults.inject import InjectedFaults, faults_from_environment
from mpidp.faults.restarts import RestartLog
from mpidp.faults.run_lock import RunLock
from mpidp.faults.stop import StopRequest, job_end, stop_time
from mpidp.parallel.replicas import Replicas
from mpidp.runtime.ulfm import RankFailure, commit
from mpidp.runtime.world import raise_together
from mpidp.training import loop, recovery, spares
from mpidp.training.build import build
from mpidp.training.checkpoints import restore
from mpidp.training.job import Job, lacks_ranks
from mpidp.training.recovery import Crew
from mpidp.training.run_plan import RunPlan

if TYPE_CHECKING:
    from mpi4py import MPI

END_SECONDS, STOP_SECONDS = 600.0, 60.0  # time limits for copying the last checkpoint: at the end, and after a request to stop
MAX_RETURNS = 3  # most returns to the last checkpoint in one command; a machine that fails more often needs repair


class RunAttempts:
    """Starts the attempts of a run on one rank, and keeps the state between them. All ranks must make the same calls."""

    def __init__(self, config: Config, plan: RunPlan | None, world: MPI.Intracomm, crew: Crew | None) -> None:
        """`plan`: the plan of the run, or None on a replacement rank. `crew`: the facts that a replacement rank receives when it
        joins, or None on other ranks. Collective over world."""
        self.config, self.plan, self.world = config, plan, world
        self.growing = crew is not None  # whether more replacement ranks may follow
        self.replicas = Replicas(list(range(world.size)), [])  # which of the world's ranks train; the others are spare ranks
        self.regrouped = crew is None  # whether `replicas` and `plan` are those of the present `world`
        self._joins = crew is not None  # whether this rank is about to join the others
        self.tries = RestartLog(Path(config.run.dir), begun=self.growing)
        self.lock: RunLock | None = None
        self.mirror: Mirror | None = None  # on rank 0, if run.mirror is set
        self.job: Job | None = None  # the job whose state this rank holds; None on spare ranks
        self.survives = True  # whether the last job can continue from memory after a failure
        self.stop: StopRequest | None = None  # the requests to stop the last job
        self._next_batch = 0  # the batch to resume with after a return to a checkpoint; 0: not set
        self._events: list[dict[str, Any]] = []  # events before this job, which are not recorded yet
        self._failed_at = 0.0  # time.monotonic() of the failure that is being recovered; 0: none
        if crew is None:
            assert plan is not None
            self.number = world.rank
            with raise_together(world):
                most = math.inf if config.faults.respawn else world.size  # replacement ranks get higher numbers
                self.faults: InjectedFaults = faults_from_environment(self.number, size=most)
                self.lock = RunLock(plan.run_dir) if world.rank == 0 else None
            size, data = world.size, plan.training.index_sha256
            self.crew = Crew(plan.config, plan.automatic, size, size, config.faults.respawn, data)
        else:
            self.crew, self.number, crew.number = crew, crew.number, crew.number + 1
            # the event is recorded only if all ranks with the state have failed
            crew.events.append({"event": "went_back", "why": "all ranks with the run's state have failed"})
            self.faults = faults_from_environment(self.number)

    def attempt(self) -> dict[str, Any] | None:
        """Add replacement ranks if needed, restore the state, and train. Return the content of the `end` line of
        metrics.jsonl. Return None if the job needs more ranks before it trains. Raises Damaged if the state is found to be
        damaged, and RankFailure if a rank fails. Collective over world."""
        self._gather()
        order = self.replicas.order
        if len(order) == self.world.size:
            end = self._train()
            self.growing = end is None
            return end
        ended = spares.attempt(self.world, order[0], self._train if self.world.rank in order else None, self._can_return)
        self.growing = ended.grow
        return ended.record if ended.over else None

    def _train(self) -> dict[str, Any] | None:
        """Restore the state and train. Return the content of the `end` line, or None if the job needs more ranks before it
        trains."""
        assert self.plan is not None
        world = self.plan.world
        with commit(world):
            if (ended := self._take_state(self.plan)) is not None:
                return ended
        assert self.job is not None
        if recovery.must_grow(self.crew, self.world.size, self.job):
            return None
        events, self._events, self._failed_at = self._events, [], 0.0
        with commit(world):
            self.stop = listen(self.job, self.stop)
            end = loop.run_to_end(self.job, self.stop, events)
        self.tries.ended(None, world.rank)
        return end

    def _gather(self) -> None:
        """Add replacement ranks until the world has its full size. Then make the plan for this world, and determine which ranks
        train."""
        mesh = self.crew.config.mesh
        joins, self._joins = self._joins, False
        if mesh.tp * mesh.pp > 1 and not joins:
            with commit(self.world):
                self.crew = recovery.newest(self.world, self.crew)
        while True:
            while self.growing and self.crew.lacks(self.world.size):
                before, self.world = self.world, recovery.one_more(self.world, self.crew, self.job)
                self.regrouped &= self.world is before
            self.growing = False
            with commit(self.world):
                if not self.regrouped:
                    self.plan, self.replicas = recovery.regroup(self.plan, self.world, self.crew, self.number, self.job)
            if self.replicas.order or not recovery.must_grow(self.crew, self.world.size, None):
                break
            self.growing = True
        if not self.replicas.order:
            raise MpidpError.on_every_rank(
                f"{self.world.size} of {self.crew.full} ranks are left, but mesh.tp={mesh.tp} x mesh.pp={mesh.pp} needs "
                f"{mesh.tp * mesh.pp} ranks, so the job ends. To resume from the last checkpoint, run the command again. You may "
                "change mesh.* and the number of ranks"
            )
        if mesh.tp * mesh.pp == 1 and self.plan is not None:
            self.world = self.plan.world
        if not self.regrouped:
            self.regrouped = True
            self._leave_seat()

    def _leave_seat(self) -> None:
        """Drop the state if all ranks that held one part of the model have failed, or if this rank does not train. Of the
        training ranks, only the first keeps the lock of the run's folder and the mirror. Independent."""
        if self.world.rank != self.replicas.order[0]:
            if self.mirror is not None:
                self.mirror.finish(0.0)
            self.lock = self.mirror = None
        if self.replicas.lost:
            self._drop_state("all ranks that held one part of the model have failed")
        elif self.job is not None and self.world.rank not in self.replicas.order:
            recovery.abandon(self.job, None)
            self.job.record.finish()
            self.job = None

    def _drop_state(self, why: str, **event: Any) -> None:
        """Drop the state of the last job, and end its watchdog. The next attempt then starts from the last checkpoint. `why`: the
        reason, for metrics.jsonl. `event`: further fields of the line. Independent."""
        if self.job is not None:
            recovery.abandon(self.job, self.stop)
            self.job = None
        self._failed_at = 0.0
        self.crew.events.append({"event": "went_back"} | event | {"why": why})

    def _take_state(self, plan: RunPlan) -> dict[str, Any] | None:
        """Make the job of all training ranks. Its state comes from the memory of the surviving ranks, or from a checkpoint.
        Return the content of the `end` line if the run is over, else None."""
        world = plan.world
        with raise_together(world):
            if world.rank == 0 and self.lock is None:
                self.lock = RunLock(plan.run_dir, ours=True)
            if world.rank == 0 and self.mirror is None and plan.config.run.mirror:
                run, failed = plan.config.run, bool(self.crew.events) or self.job is not None
                self.mirror = open_mirror(plan.run_dir, run.mirror, "auto" if failed else run.resume, run.keep)
        held = world.allgather(self.job is not None and self.survives)
        if self.job is not None and self.job.comm is world:
            return None  # no rank joined
        if not any(held):
            if self.job is not None:
                self._drop_state("ranks failed and new ranks joined. With this strategy, the state cannot be sent to new ranks")
            return self._from_disk(plan)
        if self.job is not None and all(held) and self.replicas.as_before:
            self.job, event = recovery.rebuild(self._build, plan, self.job, self.replicas, self._failed_at)
        else:
            self.job, event = recovery.hand_over(self._build, plan, self.job, self.replicas, self._failed_at)
        self._events = [*self._events, event]
        return None

    def _build(self, plan: RunPlan, before: Job | None = None) -> Job:
        return build(plan, self.faults, before, self.lock, self.tries.failed, mirror=self.mirror)

    def _from_disk(self, plan: RunPlan) -> dict[str, Any] | None:
        """Make the job from the last checkpoint, or from the initial weights if there is no checkpoint. Return the content of the
        `end` line if the run is over, else None."""
        run, events = plan.config.run, self.crew.events
        reader, notes = find_checkpoint(plan.run_dir, "auto" if events else run.resume, plan.world)
        self.plan = plan = plan.adopt(reader, notes)
        self.crew.config = plan.config
        if reader is not None and (end := plan.has_ended(reader)) is not None:
            plan.print_end(end)
            return end
        with raise_together(plan.world):
            if not events:
                self.tries.begin(reader.meta["step"] if reader is not None else -1, run.tries, plan.world.rank)
        with commit(plan.world):
            job = self._build(plan)
            if reader is not None:
                restore(job, reader)
        if self._next_batch:
            job.position.skip_to(self._next_batch)
            job.state.skipped_from = job.position.step
        self.survives, job.state.full = job.strategy.survives_failures, self.crew.full
        self._next_batch = 0
        self.job, self._events = job, [*([{"event": "resume"}] if reader is not None else []), *events[-1:]]
        return None

    def _can_return(self, damage: Damaged) -> bool:
        return self.crew.returns + (not damage.next_batch) <= MAX_RETURNS

    def go_back(self, damage: Damaged) -> None:
        """Drop the damaged state, so that the next attempt starts from the last checkpoint. After MAX_RETURNS such returns, raise
        `damage` instead. A return because of skipped batches is not counted. Independent."""
        if not self._can_return(damage):
            raise damage
        self._next_batch = damage.next_batch
        self.crew.returns += not self._next_batch
        skips = {"event": "rolled_back", "batch": damage.next_batch - 1} if damage.next_batch else {}
        self._drop_state(str(damage), **skips)

    def drop_failed_ranks(self, failure: RankFailure) -> None:
        """Continue with the surviving ranks only. If the strategy cannot resume from memory, the next attempt starts from the
        last checkpoint. Collective over the surviving ranks."""
        self._failed_at, self.growing = self._failed_at or time.monotonic(), False
        self.world, self.regrouped = recovery.survivors(self.world, str(failure)), False
        if not self.survives:
            config, self.survives = self.config, True
            method = method_setting(config.strategy.name, config.strategy.quorum)
            if method == "strategy.name=synchronous":
                method = f"optim.name={config.optim.name} with mesh.tp"
            self._drop_state(f"ranks failed, and {method} cannot continue in the middle of a step")

    def close(self, error: BaseException | None) -> None:
        """Record how the run ended, unless another job has taken over the folder. `error`: the exception that ended the run,
        or None. Wait for a limited time until the last checkpoint is copied to run.mirror. Release the lock. Independent."""
        if error is not None and (self.lock is None or self.lock.held()):
            self.tries.ended(error, self.world.rank)
        if self.mirror is not None:
            self.mirror.finish(END_SECONDS if error is None else STOP_SECONDS if isinstance(error, Stopped) else 0.0)
        if self.lock is not None:
            self.lock.release()


def listen(job: Job, before: StopRequest | None) -> StopRequest:
    """Return an object that detects requests to stop: signals and the job's time limit, and on rank 0 also the file STOP and
    the loss of the lock of the run's folder. Rank 0 prints when the time limit will stop the run. `before`: the `StopRequest`
    object of the last job, or None. A request to stop the last job also stops this job. Collective over job.comm."""
    first, state, config = job.comm.rank == 0, job.state, job.config
    if not state.recovered:  # asking the scheduler takes time
        end = job_end() if first else None
        state.stop_at = job.comm.bcast(stop_time(end, time.time(), config.run.stop_early_seconds))
        if end is not None and state.stop_at < math.inf:
            ends, stops = (f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M:%S}" for moment in (end, state.stop_at))
            job.services.progress.print(
                f"the job's time ends at {ends}. At {stops} the run writes a checkpoint and stops (exit code 75)"
            )
    lock, reason = job.services.lock, before.reason if before is not None else ""
    if lacks_ranks(job):
        reason = f"{job.comm.size} ranks are left, and faults.min_ranks is {config.faults.min_ranks}"
    return StopRequest(job.run_dir / "STOP" if first else None, state.stop_at, lambda: lock is not None and lock.lost, reason)

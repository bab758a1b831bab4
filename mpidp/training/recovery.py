"""After ranks died: those who are left go on in the same processes, with the state in their own memory.

They form groups anew, and build a job of the parts that do not depend on who is there: the model, and the memory of
parameters, optimizer state and gradients, which nobody writes to before the next update is agreed on. So whoever else dies in the
midst of this changes nothing: the next attempt begins where this one did.

With faults.respawn new processes then join them, until the job has its size again. All build a job anew, and what rank 0 holds
goes to everybody by messages. For a while that takes the memory of two jobs where the old one was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mpidp.checkpoint.manifest import committed
from mpidp.errors import Damaged, MpidpError
from mpidp.faults.inject import InjectedFaults
from mpidp.faults.respawn import add_rank
from mpidp.parallel.grid import whole
from mpidp.runtime import command
from mpidp.runtime.topology import make_topology
from mpidp.runtime.ulfm import commit, shrink
from mpidp.training.build import build
from mpidp.training.job import Job
from mpidp.training.run_plan import Plan
from mpidp.training.run_plan import plan as make_plan

if TYPE_CHECKING:
    from mpi4py import MPI


ATTEMPTS = 3  # at the same step, to come back to full size


@dataclass
class Crew:
    """What all ranks of a run know alike, and newcomers are told."""

    config: Any  # of the run, nothing left open
    asked_threads: int
    full: int  # ranks when the job began
    number: int  # of the next newcomer: ranks keep theirs, and go on counting
    respawn: bool  # may dead ranks still be replaced?
    step: int = -1  # at which newcomers were asked for last
    attempts: int = 0  # to have some, at this step
    returns: int = 0  # to the last checkpoint
    events: list[dict[str, Any]] = field(default_factory=list)  # that took the run back to its last checkpoint

    def lacks(self, size: int) -> bool:
        """Is a job of this size to grow? Independent."""
        return self.respawn and size < self.full


def those_left(world: MPI.Intracomm, why: str) -> MPI.Intracomm:
    """The world in which to go on after a RankFailure. MpidpError when MPI failed, as `why` says, and nobody died. Collective
    over world."""
    left = shrink(world)
    command.go_on_in(left)
    if left.size == world.size:
        raise MpidpError.on_every_rank(f"MPI failed ({why}), and yet no rank has died")
    return left


def wanting(crew: Crew, job: Job) -> bool:
    """Is the job to grow before it goes on? Where newcomers come and die, not more than so often at one step. The same on every
    rank. Independent."""
    if not crew.lacks(job.comm.size):
        return False
    crew.step, crew.attempts = job.position.step, 1 + crew.attempts * (crew.step == job.position.step)
    crew.respawn = crew.attempts <= ATTEMPTS
    if not crew.respawn:
        job.progress.print(f"new ranks died {ATTEMPTS} times at step {crew.step}: {job.comm.size} go on without more")
    return crew.respawn


def one_more(world: MPI.Intracomm, crew: Crew, before: Job | None) -> MPI.Intracomm:
    """World with a newcomer at its end; as it is, and no more attempts, when none can be had. before: the job that is to grow, of
    which newcomers know nothing. RankFailure when somebody dies. Collective over world."""
    if before is not None:
        before.enter("respawn")
    larger = add_rank(world, crew, before.watchdog.beat if before is not None else lambda: None)
    crew.number += 1
    if larger is not None:
        return larger
    with commit(world):
        pass
    crew.respawn = False
    if world.rank == 0:
        print(f"no new rank can be started in the place of a dead one: {world.size} go on", flush=True)
    return world


def regroup(plan: Plan | None, world: MPI.Intracomm, crew: Crew, number: int) -> Plan:
    """The plan for those who are left, or came: newcomers have none yet, and all look at the data anew with them. number: this
    rank's. Collective over world."""
    command.go_on_in(world)
    known = all(world.allgather(plan is not None))
    mesh = make_topology(world, plan.mesh if plan is not None else None, number)
    if plan is not None and known:
        return replace(plan, grid=whole(mesh))
    return replace(make_plan(crew.config, whole(mesh)), asked_threads=crew.asked_threads)


def rebuild(plan: Plan, faults: InjectedFaults, before: Job, failed_at: float) -> tuple[Job, dict[str, Any]]:
    """The job that goes on where the one before stands, and an event that tells of it. Damaged when part of its state died.
    failed_at: by time.monotonic(). Collective over plan.world."""
    before.saver.close()
    with commit(plan.world):  # all who are left go on with the new job, or with the old one again
        job = build(plan, faults, before)
        _take_over(job, before)
    before.watchdog.close()
    hosts = [host for host, size in zip(before.mesh.hosts, before.mesh.node_sizes, strict=True) for _ in range(size)]
    ranks = zip(before.mesh.numbers, hosts, strict=True)
    lost = [{"rank": number, "host": host} for number, host in ranks if number not in plan.mesh.numbers]
    seconds = time.monotonic() - failed_at
    words = ", ".join(f"{one['rank']} ({one['host']})" for one in lost)
    job.progress.print(f"step {job.position.step}  lost ranks {words}: {job.comm.size} go on after {seconds:.2f} s")
    return job, {"event": "recovered", "lost": lost, "ranks": job.comm.size, "seconds": seconds}


def abandon(job: Job) -> None:
    """Let go of a job that nobody goes on with: the next is built anew, from the last checkpoint. Independent."""
    job.saver.close()
    job.strategy.release()
    job.watchdog.close()
    if job.stop is not None:
        job.stop.close()


def _take_over(job: Job, before: Job) -> None:
    """The state of the job before, in whose memory this one was built."""
    told = [(one.step, one.skipped, one.evaluated_step) for one in job.comm.allgather(before.position)]
    if len({batches[:2] for batches in told}) > 1:
        raise Damaged.on_every_rank(f"the ranks that are left stand at different steps: {sorted(set(told))}")
    if not job.comm.allreduce(len(before.strategy.state_dict())):
        raise Damaged.on_every_rank("the rank has died that alone held the optimizer's state")
    first = told.index(max(told))  # of those who got furthest after the step: an evaluation may have been the last thing
    job.position, job.lines = job.comm.bcast((before.position, before.lines), root=first)
    job.strategy.resume_after_failure(before.strategy)
    names = [path.name for path in committed(job.run_dir / "checkpoints")] if job.comm.rank == 0 else []
    job.saver.step = job.comm.bcast(int(names[0].rpartition("_")[2]) if names else -1)
    job.passed_over_at, job.stop, job.stop_at, job.went_on = before.passed_over_at, before.stop, before.stop_at, True


def hand_over(plan: Plan, faults: InjectedFaults, before: Job | None, failed_at: float) -> tuple[Job, dict[str, Any]]:
    """The job of everybody, with the state of the job before, which rank 0 and others hold and newcomers do not; and an event.
    failed_at: of no meaning to newcomers. Collective over plan.world."""
    world = plan.world
    if before is not None:
        before.saver.close()
        before.strategy.release()
    with commit(world):
        job = build(plan, faults)
        job.strategy.resume_with_new_ranks(before.strategy if before is not None else None)
        told = None if before is None else (
            before.position, before.lines, before.saver.step, before.passed_over_at, before.stop_at, before.went_on,
        )
        job.position, job.lines, job.saver.step, job.passed_over_at, job.stop_at, job.went_on = world.bcast(told)
        old = world.bcast(None if before is None else before.mesh.numbers)
    if before is not None:
        job.stop = before.stop
        before.watchdog.close()
    came = [number for number in plan.mesh.numbers if number not in old]
    seconds = time.monotonic() - failed_at
    words = f"new ranks {', '.join(map(str, came))}: {world.size} go on after {seconds:.2f} s"
    job.progress.print(f"step {job.position.step}  {words}")
    return job, {"event": "respawned", "came": came, "ranks": world.size, "seconds": seconds}

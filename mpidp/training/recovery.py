"""Recovery after ranks failed: the surviving ranks continue in the same processes, with the state in their own memory.

They form new groups and build a new job from the parts that do not depend on the number of ranks: the model, and the memory of
parameters, optimizer state and gradients. No rank writes to this memory before the next update is agreed on. So a further failure
during recovery changes nothing: the next attempt starts where this one did.

With faults.respawn new processes then join until the job has its full size. All ranks build a new job, and rank 0 sends its state
to them by messages. For a while this takes the memory of two jobs on the ranks that had one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mpidp.checkpoint.manifest import committed
from mpidp.errors import Damaged, MpidpError
from mpidp.faults.respawn import add_rank
from mpidp.faults.stop import StopRequest
from mpidp.parallel.grid import whole
from mpidp.runtime import command
from mpidp.runtime.log import log
from mpidp.runtime.topology import make_topology
from mpidp.runtime.ulfm import commit, shrink
from mpidp.training.job import Job
from mpidp.training.run_plan import RunPlan
from mpidp.training.run_plan import plan as make_plan

if TYPE_CHECKING:
    from mpi4py import MPI


ATTEMPTS = 3  # to grow back to full size at the same step
Build = Callable[[RunPlan, Job | None], Job]


@dataclass
class Crew:
    """What all ranks of a run know alike. Replacement ranks receive it when they join."""

    config: Any  # of the run, resolved
    asked_threads: int
    full: int  # number of ranks at the start
    number: int  # of the next replacement rank: ranks keep their numbers, and new ranks get new ones
    respawn: bool  # may failed ranks still be replaced?
    step: int = -1  # at which replacements were started last
    attempts: int = 0  # to start them, at this step
    returns: int = 0  # to the last checkpoint
    events: list[dict[str, Any]] = field(default_factory=list)  # that took the run back to its last checkpoint

    def lacks(self, size: int) -> bool:
        """Must a job of this size grow? Independent."""
        return self.respawn and size < self.full


def survivors(world: MPI.Intracomm, why: str) -> MPI.Intracomm:
    """Return the world of the surviving ranks. MpidpError when MPI failed, for the reason `why`, and no rank did. Collective over
    the surviving ranks of world."""
    left = shrink(world)
    command.continue_in(left)
    if left.size == world.size:
        raise MpidpError.on_every_rank(f"MPI failed ({why}), but no rank has failed")
    return left


def must_grow(crew: Crew, job: Job) -> bool:
    """Must the job grow before it continues? After ATTEMPTS at one step the answer is no. The same on every rank. Independent."""
    if not crew.lacks(job.comm.size):
        return False
    crew.step, crew.attempts = job.position.step, 1 + crew.attempts * (crew.step == job.position.step)
    crew.respawn = crew.attempts <= ATTEMPTS
    if not crew.respawn:
        failed = f"new ranks failed {ATTEMPTS} times at step {crew.step}"
        job.services.progress.print(f"{failed}: continuing with {job.comm.size} ranks")
    return crew.respawn


def one_more(world: MPI.Intracomm, crew: Crew, before: Job | None) -> MPI.Intracomm:
    """Return the world with a replacement rank at its end; or the same world, and no more attempts, when none can be started.
    before: the job that grows; replacement ranks have none. RankFailure when a rank fails. Collective over world."""
    beat: Callable[[], None] = lambda: None  # noqa: E731
    if before is not None:
        before.services.observers.enter("respawn")
        beat = before.services.watchdog.beat
    larger = add_rank(world, crew, beat)
    crew.number += 1
    if larger is not None:
        return larger
    with commit(world):
        pass
    crew.respawn = False
    if world.rank == 0:
        log.info(f"no process can be started to replace a failed rank: continuing with {world.size} ranks")
    return world


def regroup(plan: RunPlan | None, world: MPI.Intracomm, crew: Crew, number: int) -> RunPlan:
    """Return the plan for the ranks of a new world. Replacement ranks have no plan; with them all ranks make a new one. number:
    of this rank. Collective over world."""
    command.continue_in(world)
    known = all(world.allgather(plan is not None))
    mesh = make_topology(world, plan.mesh if plan is not None else None, number)
    if plan is not None and known:
        return replace(plan, grid=whole(mesh))
    return replace(make_plan(crew.config, whole(mesh)), asked_threads=crew.asked_threads)


def rebuild(build: Build, plan: RunPlan, before: Job, failed_at: float) -> tuple[Job, dict[str, Any]]:
    """Return the job of the surviving ranks at the position of the job before, and the event to record. Damaged when part of the
    state is lost. failed_at: by time.monotonic(). Collective over plan.world."""
    before.saver.close()
    with commit(plan.world):  # either all ranks continue with the new job, or all try again from the old one
        job = build(plan, before)
        _take_over(job, before)
    before.services.watchdog.close()
    hosts = [host for host, size in zip(before.mesh.hosts, before.mesh.node_sizes, strict=True) for _ in range(size)]
    ranks = zip(before.mesh.numbers, hosts, strict=True)
    lost = [{"rank": number, "host": host} for number, host in ranks if number not in plan.mesh.numbers]
    seconds = time.monotonic() - failed_at
    names = ", ".join(f"{one['rank']} ({one['host']})" for one in lost)
    job.services.progress.print(
        f"step {job.position.step}  lost ranks {names}: continuing with {job.comm.size} ranks after {seconds:.2f} s"
    )
    return job, {"event": "recovered", "lost": lost, "ranks": job.comm.size, "seconds": seconds}


def abandon(job: Job, stop: StopRequest | None) -> None:
    """Release a job that no rank continues; the next job starts from the last checkpoint. Independent."""
    job.saver.close()
    job.strategy.release()
    job.services.watchdog.close()
    if stop is not None:
        stop.close()


def _take_over(job: Job, before: Job) -> None:
    """Give the job the state of the job before, whose memory it uses."""
    reached = [(one.step, one.skipped, one.evaluated_step) for one in job.comm.allgather(before.position)]
    if len({batches[:2] for batches in reached}) > 1:
        raise Damaged.on_every_rank(f"the surviving ranks are at different steps: {sorted(set(reached))}")
    if not job.comm.allreduce(len(before.strategy.state_dict())):
        raise Damaged.on_every_rank("the only rank that held the optimizer state has failed")
    first = reached.index(max(reached))  # a rank that got furthest after the step, for example through an evaluation
    job.state.adopt(job.comm.bcast(before.state.portable(), root=first))
    job.state.recovered = True
    job.strategy.resume_after_failure(before.strategy)
    names = [path.name for path in committed(job.run_dir / "checkpoints")] if job.comm.rank == 0 else []
    job.saver.resumed_at(job.comm.bcast(int(names[0].rpartition("_")[2]) if names else -1))


def hand_over(build: Build, plan: RunPlan, before: Job | None, failed_at: float) -> tuple[Job, dict[str, Any]]:
    """Return the job of all ranks, with the state that rank 0 and others hold and replacement ranks do not; and the event to
    record. failed_at: meaningless on replacement ranks. Collective over plan.world."""
    world = plan.world
    if before is not None:
        before.saver.close()
        before.strategy.release()
    with commit(world):
        job = build(plan, None)
        job.strategy.resume_with_new_ranks(before.strategy if before is not None else None)
        held = None if before is None else (before.state.portable(), before.saver.step, before.mesh.numbers)
        state, saved_step, old = world.bcast(held)
        job.state.adopt(state)
        job.saver.resumed_at(saved_step)
    if before is not None:
        before.services.watchdog.close()
    came = [number for number in plan.mesh.numbers if number not in old]
    seconds = time.monotonic() - failed_at
    words = f"new ranks {', '.join(map(str, came))}: continuing with {world.size} ranks after {seconds:.2f} s"
    job.services.progress.print(f"step {job.position.step}  {words}")
    return job, {"event": "respawned", "came": came, "ranks": world.size, "seconds": seconds}

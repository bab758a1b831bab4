"""Recovery after ranks have failed. The surviving ranks continue in the same processes, with the state in their memory.

They form new groups and build a new job. The new job takes over the objects that do not depend on the number of ranks. These are
the model, and the memory of parameters, optimizer state and gradients. No rank writes to this memory before all ranks have agreed
on the next update. Therefore a further failure during recovery does not change the state, and the next attempt starts from the
same state.

With faults.respawn, new processes then join until the job has its full number of ranks. All ranks build a new job, and rank 0
sends its state to the new ranks in MPI messages. During this time the old ranks have two jobs in memory.
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


ATTEMPTS = 3  # number of attempts to start replacement ranks at the same step
Build = Callable[[RunPlan, Job | None], Job]


@dataclass
class Crew:
    """Facts about a run that are the same on all ranks. New ranks receive them when they join."""

    config: Any  # the resolved configuration of the run
    automatic: frozenset[str]  # as RunPlan.automatic
    full: int  # number of ranks at the start
    number: int  # number of the next new rank: a number is never used again
    respawn: bool  # whether failed ranks may still be replaced
    step: int = -1  # the last step at which new ranks were started
    attempts: int = 0  # number of attempts to start new ranks at this step
    returns: int = 0  # number of returns to the last checkpoint
    events: list[dict[str, Any]] = field(default_factory=list)  # the lines in metrics.jsonl about returns to the last checkpoint

    def lacks(self, size: int) -> bool:
        """Return whether a job of this size needs replacement ranks. Independent."""
        return self.respawn and size < self.full


def survivors(world: MPI.Intracomm, why: str) -> MPI.Intracomm:
    """Return a communicator of the surviving ranks. Raises MpidpError if no rank has failed. why: the error that MPI reported.
    Collective over the surviving ranks of world."""
    left = shrink(world)
    command.continue_in(left)
    if left.size == world.size:
        raise MpidpError.on_every_rank(f"MPI failed ({why}), but no rank has failed")
    return left


def must_grow(crew: Crew, job: Job) -> bool:
    """Return whether the job needs replacement ranks before it continues. After ATTEMPTS attempts at one step, return False. The
    result is the same on every rank. Independent."""
    if not crew.lacks(job.comm.size):
        return False
    crew.step, crew.attempts = job.position.step, 1 + crew.attempts * (crew.step == job.position.step)
    crew.respawn = crew.attempts <= ATTEMPTS
    if not crew.respawn:
        failed = f"new ranks failed {ATTEMPTS} times at step {crew.step}"
        job.services.progress.print(f"{failed}: continuing with {job.comm.size} ranks")
    return crew.respawn


def one_more(world: MPI.Intracomm, crew: Crew, before: Job | None) -> MPI.Intracomm:
    """Start a replacement rank, and return a communicator of world's ranks followed by the new rank. If no process can be
    started, return world, and make no further attempts in this run. before: the job of the surviving ranks, or None on
    replacement ranks. Raises RankFailure if a rank fails. Collective over world."""
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
    """Return the plan for the ranks of a new world. If there are replacement ranks, which have no plan, all ranks make a new
    plan. number: this rank's number, which does not change when the world changes. Collective over world."""
    command.continue_in(world)
    known = all(world.allgather(plan is not None))
    mesh = make_topology(world, plan.mesh if plan is not None else None, number)
    if plan is not None and known:
        return replace(plan, grid=whole(mesh))
    return replace(make_plan(crew.config, whole(mesh)), automatic=crew.automatic)


def rebuild(build: Build, plan: RunPlan, before: Job, failed_at: float) -> tuple[Job, dict[str, Any]]:
    """Make a job of the surviving ranks, which continues at the position of `before`. Return the job, and a line for
    metrics.jsonl. Raises Damaged if the surviving ranks do not have the whole state, or are at different steps. failed_at:
    time.monotonic() of the failure. Collective over plan.world."""
    before.saver.close()
    with commit(plan.world):  # all ranks continue with the new job, or all ranks try again from the old job
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
    """Release a job whose state is not needed, because the next job starts from the last checkpoint. Independent."""
    job.saver.close()
    job.strategy.release()
    job.services.watchdog.close()
    if stop is not None:
        stop.close()


def _take_over(job: Job, before: Job) -> None:
    """Give `job` the state of `before`. Both jobs use the same memory."""
    reached = [(one.step, one.skipped, one.evaluated_step) for one in job.comm.allgather(before.position)]
    if len({batches[:2] for batches in reached}) > 1:
        raise Damaged.on_every_rank(f"the surviving ranks are at different steps: {sorted(set(reached))}")
    if not job.comm.allreduce(len(before.strategy.state_dict())):
        raise Damaged.on_every_rank("the only rank that held the optimizer state has failed")
    first = reached.index(max(reached))  # the rank that did the most work after the step, for example an evaluation
    job.state.adopt(job.comm.bcast(before.state.portable(), root=first))
    job.state.recovered = True
    job.strategy.resume_after_failure(before.strategy)
    names = [path.name for path in committed(job.run_dir / "checkpoints")] if job.comm.rank == 0 else []
    job.saver.resumed_at(job.comm.bcast(int(names[0].rpartition("_")[2]) if names else -1))


def hand_over(build: Build, plan: RunPlan, before: Job | None, failed_at: float) -> tuple[Job, dict[str, Any]]:
    """Make a job of all ranks. Rank 0 sends its state to the replacement ranks. Return the job, and a line for metrics.jsonl.
    before: the previous job, or None on replacement ranks. failed_at: as in rebuild(). Collective over plan.world."""
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

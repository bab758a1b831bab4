"""Recovery after ranks have failed. The surviving ranks continue in the same processes, with the state in their memory.

The surviving ranks form new groups and build a new job. The new job takes over the model, and the memory of parameters, optimizer
state and gradients. No rank writes to this memory before all ranks have agreed on the next update. Therefore another failure
during recovery does not change the state, and the next attempt starts from it.

With faults.respawn, new processes then join until the job has its full number of ranks. All ranks build a new job, and rank 0
sends its state to the new ranks in MPI messages. During this time the old ranks have two jobs in memory.

If mesh.tp or mesh.pp divides the model, the living ranks form as many replicas as they can (parallel/replicas.py). The other
ranks wait (spares.py). If ranks of different old replicas form one replica, all ranks build a new job, and the first replica
sends its state.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from mpi4py import MPI

from mpidp.checkpoint.manifest import committed
from mpidp.errors import Damaged, DataError, MpidpError
from mpidp.faults.respawn import add_rank
from mpidp.faults.stop import StopRequest
from mpidp.parallel.grid import Grid, divide, whole
from mpidp.parallel.replicas import Replicas, form_replicas
from mpidp.runtime import command
from mpidp.runtime.log import log
from mpidp.runtime.topology import make_topology
from mpidp.runtime.ulfm import commit, shrink
from mpidp.training.job import Job
from mpidp.training.run_plan import RunPlan
from mpidp.training.run_plan import plan as make_plan

ATTEMPTS = 3  # number of attempts to start replacement ranks at the same step
Build = Callable[[RunPlan, Job | None], Job]


@dataclass
class Crew:
    """Facts about a run that are the same on all ranks. A new rank receives these facts when it joins."""

    config: Any  # the resolved configuration of the run
    automatic: frozenset[str]  # as RunPlan.automatic
    full: int  # number of ranks at the start
    number: int  # number of the next new rank: a number is never used again
    respawn: bool  # whether failed ranks may still be replaced
    data: str  # the sha256 of the data's index.json
    step: int = -1  # the last step at which new ranks were started
    attempts: int = 0  # number of attempts to start new ranks at this step
    returns: int = 0  # number of returns to the last checkpoint
    events: list[dict[str, Any]] = field(default_factory=list)  # the lines in metrics.jsonl about returns to the last checkpoint

    def lacks(self, size: int) -> bool:
        """Return whether a job of `size` ranks needs replacement ranks. Independent."""
        return self.respawn and size < self.full


def survivors(world: MPI.Intracomm, why: str) -> MPI.Intracomm:
    """Return a communicator of the surviving ranks. `why`: the error that MPI reported. Raises MpidpError if no rank has failed.
    Collective over the surviving ranks of world."""
    left = shrink(world)
    command.continue_in(left)
    if left.size == world.size:
        raise MpidpError.on_every_rank(f"MPI failed ({why}), but no rank has failed")
    return left


def must_grow(crew: Crew, size: int, job: Job | None) -> bool:
    """Return whether a job of `size` living ranks must get replacement ranks before it continues. If so, this call counts as an
    attempt. After ATTEMPTS attempts at one step, return False. `job`: the job, or None if no rank has a state. The result is the
    same on every rank. Independent."""
    if not crew.lacks(size):
        return False
    step = job.position.step if job is not None else -1
    crew.step, crew.attempts = step, 1 + crew.attempts * (crew.step == step)
    crew.respawn = crew.attempts <= ATTEMPTS
    if not crew.respawn and job is not None:
        failed = f"new ranks failed {ATTEMPTS} times at step {crew.step}"
        job.services.progress.print(f"{failed}: continuing with {job.comm.size} ranks")
    return crew.respawn


def one_more(world: MPI.Intracomm, crew: Crew, before: Job | None) -> MPI.Intracomm:
    """Start a replacement rank. Return a communicator of world's ranks, followed by the new rank. If no process can be started,
    return `world`, and make no further attempts in this run. `before`: the job of the surviving ranks, or None on replacement
    ranks. Raises RankFailure if a rank fails. Collective over world."""
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


def newest(world: MPI.Intracomm, crew: Crew) -> Crew:
    """Return the newest `Crew` of all ranks, because the `Crew` of a spare (waiting) rank may be out of date. Collective over
    world."""
    ages = world.allgather((len(crew.events), crew.number, crew.step, crew.attempts, not crew.respawn))
    return world.bcast(crew, root=ages.index(max(ages)))  # type: ignore[no-any-return]


def regroup(
    plan: RunPlan | None, world: MPI.Intracomm, crew: Crew, number: int, job: Job | None
) -> tuple[RunPlan | None, Replicas]:
    """Return the plan for a new world, and which ranks of this world train. A replacement rank has no plan. If a replacement
    rank trains, all training ranks make a new plan. Otherwise they keep their plan. `number`: this rank's permanent number.
    `job`: the job whose state this rank holds, or None. Collective over world."""
    command.continue_in(world)
    tp, pp = crew.config.mesh.tp, crew.config.mesh.pp
    if tp * pp == 1:
        mesh = make_topology(world, plan.mesh if plan is not None else None, number)
        return _planned(plan, whole(mesh), crew), Replicas(list(range(world.size)), mesh.numbers)
    seat = None if job is None else (job.comm.rank // job.grid.parts, job.grid.model.rank)
    rows = world.allgather((seat, number))
    found = form_replicas([row[0] for row in rows], [row[1] for row in rows], tp * pp)
    trains = world.rank in found.order
    place = found.order.index(world.rank) if trains else 0
    ranks = cast(MPI.Intracomm, world.Split(0 if trains else MPI.UNDEFINED, place))
    if not trains:
        return plan, found
    before, same_part = (None, None) if plan is None else (plan.grid.everyone, plan.grid.replicas)
    everyone = make_topology(ranks, before, number, keep_order=True)
    return _planned(plan, divide(everyone, tp, pp, same_part), crew), found


def _planned(plan: RunPlan | None, grid: Grid, crew: Crew) -> RunPlan:
    """Return the plan for the ranks of `grid`. Raises DataError if the data is not the data of the run. Collective over
    grid.world."""
    known = all(grid.world.allgather(plan is not None))
    if plan is not None and known:
        return replace(plan, grid=grid)
    made = replace(make_plan(crew.config, grid), automatic=crew.automatic)
    if made.training.index_sha256 != crew.data:
        raise DataError.on_every_rank(
            f"{crew.config.data.path} was replaced during the run, so no new rank can join. Restore the original data"
        )
    return made


def rebuild(build: Build, plan: RunPlan, before: Job, found: Replicas, failed_at: float) -> tuple[Job, dict[str, Any]]:
    """Return a job of the surviving ranks, and a line for metrics.jsonl. The job continues at the position of `before`. `build`:
    builds a job. `found`: the result of regroup(). `failed_at`: time.monotonic() of the failure. Raises Damaged if the surviving
    ranks do not have the whole state, or are at different steps. Collective over plan.world."""
    before.saver.close()
    with commit(plan.world):  # all ranks continue with the new job, or all ranks try again from the old job
        job = build(plan, before)
        if not job.comm.allreduce(len(before.strategy.state_dict())):
            raise Damaged.on_every_rank("the only rank that held the optimizer state has failed")
        old = _take_over(job, before)
        job.strategy.resume_after_failure(before.strategy)
    before.services.watchdog.close()
    return job, _event(job, old, found, failed_at)


def abandon(job: Job, stop: StopRequest | None) -> None:
    """Release a job that does not continue on this rank. Independent."""
    job.saver.close()
    job.strategy.release()
    job.services.watchdog.close()
    if stop is not None:
        stop.close()


def hand_over(
    build: Build, plan: RunPlan, before: Job | None, found: Replicas, failed_at: float
) -> tuple[Job, dict[str, Any]]:
    """Return a job of all training ranks, and a line for metrics.jsonl. The first replica sends its state to the others.
    `before`: the previous job, or None on ranks without a state. `build`, `found`, `failed_at`: as in rebuild(). Collective over
    plan.world."""
    if before is not None:
        before.saver.close()
        before.strategy.release()
    with commit(plan.world):
        job = build(plan, None)
        holds = before is not None and before.grid.label == job.grid.label
        job.strategy.resume_with_new_ranks(before.strategy if before is not None and holds else None)
        old = _take_over(job, before)
    if before is not None:
        before.services.watchdog.close()
    return job, _event(job, old, found, failed_at)


def _take_over(job: Job, before: Job | None) -> list[tuple[int, str]]:
    """Copy the state besides parameters and optimizer state from the previous job to `job`. Return (number, host) of each rank of
    the previous job."""
    reached: list[tuple[int, int, int]] = job.comm.allgather(
        (-1, -1, -1) if before is None else (before.position.step, before.position.skipped, before.position.evaluated_step)
    )
    known = {one for one in reached if one[0] >= 0}
    if len({batches[:2] for batches in known}) > 1:
        raise Damaged.on_every_rank(f"the surviving ranks are at different steps: {sorted(known)}")
    first = reached.index(max(known))  # a rank that did the most work after the step, for example an evaluation
    mesh = before.grid.everyone if before is not None else job.grid.everyone
    hosts = [host for host, size in zip(mesh.hosts, mesh.node_sizes, strict=True) for _ in range(size)]
    held = None if before is None else (before.state.portable(), list(zip(mesh.numbers, hosts, strict=True)))
    state, old = job.comm.bcast(held, root=first)
    job.state.adopt(state)
    job.state.recovered = True
    names = [path.name for path in committed(job.run_dir / "checkpoints")] if job.comm.rank == 0 else []
    job.saver.resumed_at(job.comm.bcast(int(names[0].rpartition("_")[2]) if names else -1))
    return old  # type: ignore[no-any-return]


def _event(job: Job, old: list[tuple[int, str]], found: Replicas, failed_at: float) -> dict[str, Any]:
    """Print which ranks failed or joined, and return a line for metrics.jsonl. `old`: (number, host) of each rank of the previous
    job."""
    lost = [{"rank": number, "host": host.rstrip("#")} for number, host in old if number not in found.numbers]
    known = {number for number, _ in old}
    came = [number for number in job.grid.everyone.numbers if number not in known]
    spares, size, seconds = found.spares(), job.comm.size, time.monotonic() - failed_at
    names = ", ".join(f"{one['rank']} ({one['host']})" for one in lost)
    words = [f"lost ranks {names}"] if lost else []
    words += [f"ranks {', '.join(map(str, came))} joined"] if came else []
    spare = f", spare ranks {', '.join(map(str, spares))}" if spares else ""
    what = ", ".join(words) or "no rank lost"
    job.services.progress.print(f"step {job.position.step}  {what}: continuing with {size} ranks{spare} after {seconds:.2f} s")
    event = {"event": "recovered", "lost": lost} if lost or not came else {"event": "respawned"}
    return event | ({"came": came} if came else {}) | ({"spares": spares} if spares else {}) | {"ranks": size, "seconds": seconds}

"""One step's work before the update: this rank's lanes, looked at where that is due, and the board on which all tell each other
what they computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpidp.comm.slices import squares_of_blocks
from mpidp.data.loader import Batch
from mpidp.errors import MpidpError
from mpidp.faults.audit import AuditFinding, SpareSlot
from mpidp.parallel.engine import Computed
from mpidp.parallel.schedule import interleaved, one_by_one, one_f_one_b
from mpidp.reducers.base import LaneObserver
from mpidp.training.audits import say_finding
from mpidp.training.job import Job

ATTEMPTS = 3  # at a step whose gradients two ranks do not agree on


def compute(job: Job, batch: Batch) -> Computed:
    """Forward and backward of this rank's lanes. In an audited step some lanes are computed by two ranks; where they differ the
    step is done again, and MpidpError names the suspects when that does not help. Independent, but for audited steps: then
    collective over job.comm."""
    step = job.position.step + 1
    squares: dict[int, float] = {}
    observers = []
    if job.noise_every and step % job.noise_every == 0:
        observers.append(lambda lane, gradient: squares.update({lane: float(squares_of_blocks(gradient).sum())}))
    if not job.audit.due(step):
        job.strategy.observe_lanes([*job.faults.gradient_faults(step), *observers])
        return _run(job, batch, squares, job.balance.lanes(batch.batch))
    finding: AuditFinding | None = None
    for attempt in range(ATTEMPTS):
        again, _ = job.audit.begin(step, job.balance.ranges)
        job.strategy.observe_lanes([*job.faults.gradient_faults(step, attempt), *observers, job.audit.record])
        # Lanes do not change hands in this step: a rank that took one could be asked to check itself.
        done = _run(job, batch, squares, iter(job.balance.ranges[job.mesh.dp.rank]))
        finding = _compute_again(job, batch, again, job.faults.gradient_faults(step, attempt=1))
        if finding is None:
            return done
        say_finding(job, step, finding, "the step is done again")
        job.strategy.discard()
    assert finding is not None
    raise MpidpError.on_every_rank(
        f"step {step}: {finding.what}, {ATTEMPTS} times in a row. Take ranks {finding.ranks} out of the job (a core or memory of "
        "theirs fails) and start again: the last checkpoint is from before"
    )


def _run(job: Job, batch: Batch, squares: dict[int, float], lanes: Iterator[int]) -> Computed:
    if job.balance.static:
        mine = [v for lane in lanes for v in job.lanes.micro_batches(lane)]
        place, chunks = (job.grid.pp.rank, job.grid.pp.size), len(job.parts.part.chunks)
        schedule = one_f_one_b(mine, *place) if chunks == 1 else interleaved(mine, *place, chunks)
    else:
        schedule = one_by_one(v for lane in lanes for v in job.lanes.micro_batches(lane))
    done = job.engine.run(schedule, batch, job.strategy)
    done.lane_squares = squares
    return done


def _compute_again(job: Job, batch: Batch, lane: int, spoils: Sequence[LaneObserver]) -> AuditFinding | None:
    """Another rank's lane, in a spare slot; spoils: faults on purpose. Collective over job.comm."""
    aside = SpareSlot(job.audit.buffer, -1)
    job.engine.run(one_f_one_b(list(job.lanes.micro_batches(lane)), job.grid.pp.rank, job.grid.pp.size), batch, aside)
    for spoil in spoils:
        spoil(lane, aside.gradient)
    return job.audit.compare(lane, aside.gradient)

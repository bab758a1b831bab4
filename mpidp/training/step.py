"""Runs the forward and backward passes of one step on this rank. Also runs the audit of the step if one is due."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mpidp.comm.slices import squares_of_blocks
from mpidp.data.loader import Batch, MicroBatch
from mpidp.errors import MpidpError
from mpidp.faults.audit import AuditFinding, SpareSlot
from mpidp.parallel.engine import Computed
from mpidp.parallel.schedule import interleaved, one_by_one, one_f_one_b
from mpidp.reducers.base import LaneObserver
from mpidp.training.audits import report_finding
from mpidp.training.job import Job

ATTEMPTS = 3  # number of attempts at a step in which two ranks compute different gradients


def compute(job: Job, batch: Batch) -> Computed:
    """Run the forward and backward passes of this rank's lanes (sequences of micro-batches). In an audited step, two ranks
    compute the same lane, and the step is computed again if the two gradients differ. If the gradients still differ after
    ATTEMPTS attempts, raises an MpidpError that names the suspected ranks. Collective over job.comm in an audited step, else
    independent."""
    step, faults = job.position.step + 1, job.services.faults
    squares: dict[int, float] = {}
    looks = []
    noise_every = job.config.train.noise_every
    if noise_every and step % noise_every == 0:
        looks.append(lambda lane, gradient: squares.update({lane: float(squares_of_blocks(gradient).sum())}))
    if not job.audit.due(step):
        job.strategy.observe_lanes([*faults.gradient_faults(step), *looks])
        return _run(job, batch, squares, job.balance.lanes(batch.batch))
    finding: AuditFinding | None = None
    for attempt in range(ATTEMPTS):
        again, _ = job.audit.begin(step, job.balance.ranges)
        job.strategy.observe_lanes([*faults.gradient_faults(step, attempt), *looks, job.audit.record])
        # Lanes do not move between ranks in this step. Otherwise a rank could check its own lane.
        done = _run(job, batch, squares, iter(job.balance.ranges[job.mesh.dp.rank]))
        finding = _compute_again(job, batch, again, faults.gradient_faults(step, attempt=1))
        if finding is None:
            return done
        report_finding(job, step, finding, "the step is computed again")
        job.strategy.discard()
    assert finding is not None
    raise MpidpError.on_every_rank(
        f"step {step}: {finding.what}, {ATTEMPTS} times in a row. A core or the memory of one of the ranks "
        f"{finding.ranks} is faulty. Exclude the nodes of these ranks, and start again. The last checkpoint was written before "
        "the failure"
    )


def _run(job: Job, batch: Batch, squares: dict[int, float], lanes: Iterator[int]) -> Computed:
    if job.balance.static:
        mine = _with_empty(job, batch, job.micro_batches())
        place, chunks = (job.grid.pp.rank, job.grid.pp.size), len(job.parts.part.chunks)
        schedule = one_f_one_b(mine, *place) if chunks == 1 else interleaved(mine, *place, chunks)
    else:
        schedule = one_by_one(v for lane in lanes for v in job.lanes.micro_batches(lane))
    done = job.engine.run(schedule, batch, job.strategy)
    if job.lanes.num_micro_batches in done.micro_batches:
        for numbers in (done.micro_batches, done.losses, done.num_tokens):
            numbers.pop()
    done.lane_squares = squares
    return done


def _with_empty(job: Job, batch: Batch, mine: list[int]) -> list[int]:
    """Return the micro-batches `mine`. With mesh.shard=2|3, all ranks must run the same number of passes. If this rank has one
    micro-batch less than other ranks, add an empty one to `batch` and to the result. Its number is V, one more than the last."""
    most = -(-job.lanes.num_micro_batches // job.mesh.dp.size)
    if job.memory.level < 2 or len(mine) == most:
        return mine
    number, nothing = job.lanes.num_micro_batches, torch.empty((0, job.config.model.seq_len), dtype=torch.int64)
    batch.micro_batches[number] = MicroBatch(number, nothing, nothing, 0)
    return [*mine, number]


def _compute_again(job: Job, batch: Batch, lane: int, spoils: Sequence[LaneObserver]) -> AuditFinding | None:
    """Compute lane (sequence of micro-batches) number `lane`, which another rank has computed, in a spare buffer. Compare the
    two gradients, and return the finding if they differ. `spoils`: injected faults. Collective over job.comm."""
    aside = SpareSlot(job.audit.buffer, -1)
    job.engine.run(one_f_one_b(list(job.lanes.micro_batches(lane)), job.grid.pp.rank, job.grid.pp.size), batch, aside)
    for spoil in spoils:
        spoil(lane, aside.gradient)
    return job.audit.compare(lane, aside.gradient)

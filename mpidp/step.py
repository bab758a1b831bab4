"""One step's work before the update: this rank's lanes, looked at where that is due, and the board on which all tell each other
what they computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpidp.audit import Aside, Finding
from mpidp.comm.buckets import squares_of_blocks
from mpidp.comm.reducers import Look
from mpidp.data.loader import Batch
from mpidp.engine import Computed
from mpidp.errors import MpidpError
from mpidp.job import Job
from mpidp.noise import Noise, estimate
from mpidp.schedule import interleaved, one_by_one, one_f_one_b

ATTEMPTS = 3  # at a step whose gradients two ranks do not agree on


def compute(job: Job, batch: Batch) -> Computed:
    """Forward and backward of this rank's lanes. In an audited step some lanes are computed by two ranks; where they differ the
    step is done again, and MpidpError names the suspects when that does not help. Independent, but for audited steps: then
    collective over job.comm."""
    step = job.position.step + 1
    squares: dict[int, float] = {}
    looks = []
    if job.noise_every and step % job.noise_every == 0:
        looks.append(lambda lane, gradient: squares.update({lane: float(squares_of_blocks(gradient).sum())}))
    if not job.audit.due(step):
        job.strategy.watch([*job.faults.spoils(step), *looks])
        return _run(job, batch, squares, job.balance.lanes(batch.batch))
    finding: Finding | None = None
    for attempt in range(ATTEMPTS):
        again, _ = job.audit.begin(step, job.balance.ranges)
        job.strategy.watch([*job.faults.spoils(step, attempt), *looks, job.audit.look])
        # Lanes do not change hands in this step: a rank that took one could be asked to check itself.
        done = _run(job, batch, squares, iter(job.balance.ranges[job.mesh.dp.rank]))
        finding = _compute_again(job, batch, again, job.faults.spoils(step, attempt=1))
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
    if job.balance.settled:
        mine = [v for lane in lanes for v in job.lanes.micro_batches(lane)]
        place, chunks = (job.grid.pp.rank, job.grid.pp.size), len(job.parts.part.chunks)
        schedule = one_f_one_b(mine, *place) if chunks == 1 else interleaved(mine, *place, chunks)
    else:
        schedule = one_by_one(v for lane in lanes for v in job.lanes.micro_batches(lane))
    done = job.engine.run(schedule, batch, job.strategy)
    done.lane_squares = squares
    return done


def _compute_again(job: Job, batch: Batch, lane: int, spoils: Sequence[Look]) -> Finding | None:
    """Another rank's lane, in a spare slot; spoils: faults on purpose. Collective over job.comm."""
    aside = Aside(job.audit.buffer, -1)
    job.engine.run(one_f_one_b(list(job.lanes.micro_batches(lane)), job.grid.pp.rank, job.grid.pp.size), batch, aside)
    for spoil in spoils:
        spoil(lane, aside.gradient)
    return job.audit.compare(lane, aside.gradient)


def say_finding(job: Job, step: int, finding: Finding, then: str) -> None:
    """Of an audit: to people and to metrics.jsonl. Independent."""
    job.record({"event": "audit", "step": job.position.step, "of_step": step, "ranks": finding.ranks, "what": finding.what,
                "then": then})
    job.progress.say(f"step {step}  audit: ranks {finding.ranks}: {finding.what}; {then}")


@dataclass
class Board:
    """What all ranks tell each other of the steps since they met last, mostly one; the same on every rank. Between meetings it
    is what this rank alone knows of its step."""

    losses: np.ndarray  # (V,) sums of token losses
    num_tokens: np.ndarray  # (V,) target tokens
    seconds: np.ndarray  # (P,) of computing
    data_seconds: np.ndarray  # (P,) of waiting for data
    counts: np.ndarray  # (P,) lanes computed
    lane_squares: np.ndarray  # (L,) squared norms of their gradients, where measured
    saving: np.ndarray  # (4,) ranks that write a checkpoint, or try to; is one due by the clock? (saver.py)
    stop: bool
    met: bool  # did they?
    divisor: int  # target tokens of this step, of all ranks, or of this one where each makes a step of its own
    steps: int  # that it tells of
    joules: float = 0.0  # of all machines since this was last told

    @property
    def tokens(self) -> int:
        """Target tokens of the global batches."""
        return int(self.num_tokens.sum())

    @property
    def loss(self) -> float:
        """Mean over tokens. Loss sums of micro-batches are added in their order: the figure does not depend on the number of
        ranks."""
        return sum(self.losses.tolist()) / max(1.0, self.tokens)


def share(job: Job, done: Computed, seconds: float, stop: bool) -> Board:
    """Put what this rank computed on everybody's board; where the strategy lets ranks meet more seldom, it stays with this rank
    until then. From here on the state may change: no rank copies it for a checkpoint any more. Collective over job.comm."""
    with job.clock.timed("stall"):  # inside comm_wait, and no communication
        job.saver.linger(job.position.step + 1)
        job.saver.copied()
    met, size, count = job.strategy.meets(job.position.step + 1), job.comm.size, job.lanes.num_micro_batches
    lengths = [count, count, size, size, size, job.lanes.num_lanes, 4, 1, 1, 1]
    flat = np.zeros(sum(lengths))
    losses, num_tokens, spent, data, counts, squares, saving, stops, steps, joules = np.split(flat, np.cumsum(lengths)[:-1])
    tells = job.engine.tells  # else another rank of this replica does
    if tells or not met:
        losses[done.micro_batches], num_tokens[done.micro_batches] = done.losses, done.num_tokens
    data[job.comm.rank], joules[0] = job.clock.so_far("data"), job.meter.take()
    spent[job.comm.rank], counts[job.comm.rank] = seconds, len(set(map(job.lanes.lane_of, done.micro_batches)))
    squares[list(done.lane_squares)] = list(done.lane_squares.values())
    steps[0] = job.comm.rank == 0
    if not met:
        job.untold = (0.0 if job.untold is None else job.untold) + flat
        job.untold[: 2 * count * (not tells)] = 0.0
        spent[:] = seconds  # of the others it knows nothing
        return Board(losses, num_tokens, spent, data, counts, squares, saving, False, False, sum(done.num_tokens), 1)
    if job.untold is not None:
        flat += job.untold
        job.untold = None
    saving[:], stops[0] = job.saver.flags(), stop
    job.wait(job.comm.Iallreduce(MPI.IN_PLACE, flat))
    divisor = int(num_tokens.sum()) if job.strategy.meets_always else sum(done.num_tokens)
    stop, told = bool(stops[0]), (int(steps[0]), float(joules[0]))
    return Board(losses, num_tokens, spent, data, counts, squares, saving, stop, True, divisor, *told)


def noise_of(job: Job, board: Board, grad_norm: float) -> Noise | None:
    """The gradient noise of a step in which lanes were measured; None in others, or where it cannot be said. Independent."""
    if not board.lane_squares.any():
        return None
    tokens = [int(board.num_tokens[list(job.lanes.micro_batches(lane))].sum()) for lane in range(job.lanes.num_lanes)]
    nominal = job.engine.nominal_tokens  # by which losses were divided before backward
    squares = [s * (nominal / n) ** 2 if n else 0.0 for s, n in zip(board.lane_squares.tolist(), tokens, strict=True)]
    return estimate(squares, tokens, grad_norm**2)

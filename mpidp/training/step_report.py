"""What the ranks report to each other after a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpidp.metrics.gradient_noise import Noise, estimate
from mpidp.parallel.engine import Computed
from mpidp.training.job import Job


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
        job.saver.wait_for_recent_save(job.position.step + 1)
        job.saver.wait_for_copy()
    met, size, count = job.strategy.synchronizes_at(job.position.step + 1), job.comm.size, job.lanes.num_micro_batches
    lengths = [count, count, size, size, size, job.lanes.num_lanes, 4, 1, 1, 1]
    flat = np.zeros(sum(lengths))
    losses, num_tokens, spent, data, counts, squares, saving, stops, steps, joules = np.split(flat, np.cumsum(lengths)[:-1])
    reports_loss = job.engine.reports_loss  # else another rank of this replica does
    if reports_loss or not met:
        losses[done.micro_batches], num_tokens[done.micro_batches] = done.losses, done.num_tokens
    data[job.comm.rank], joules[0] = job.clock.so_far("data"), job.meter.pop_joules()
    spent[job.comm.rank], counts[job.comm.rank] = seconds, len(set(map(job.lanes.lane_of, done.micro_batches)))
    squares[list(done.lane_squares)] = list(done.lane_squares.values())
    steps[0] = job.comm.rank == 0
    if not met:
        job.untold = (0.0 if job.untold is None else job.untold) + flat
        job.untold[: 2 * count * (not reports_loss)] = 0.0
        spent[:] = seconds  # of the others it knows nothing
        return Board(losses, num_tokens, spent, data, counts, squares, saving, False, False, sum(done.num_tokens), 1)
    if job.untold is not None:
        flat += job.untold
        job.untold = None
    saving[:], stops[0] = job.saver.flags(), stop
    job.wait(job.comm.Iallreduce(MPI.IN_PLACE, flat))
    divisor = int(num_tokens.sum()) if job.strategy.synchronizes_always else sum(done.num_tokens)
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

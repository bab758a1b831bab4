"""The reports that ranks exchange after they have computed a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpidp.comm.slices import sum_in_order
from mpidp.metrics.gradient_noise import Noise, estimate
from mpidp.parallel.engine import Computed
from mpidp.training.job import Job


@dataclass
class StepReport:
    """The reports of all ranks since the last exchange, which usually cover one step. Every rank has the same values. If the
    step is not a meeting (a step at which all ranks synchronize), the object contains only this rank's report of the step."""

    numbers: np.ndarray  # all numbers of the report; the arrays below are views of it
    losses: np.ndarray  # (V,) sums of token losses
    num_tokens: np.ndarray  # (V,) target tokens
    seconds: np.ndarray  # (P,) seconds of computing on each rank
    data_seconds: np.ndarray  # (P,) seconds of waiting for data on each rank
    counts: np.ndarray  # (P,) number of lanes that each rank computed
    lane_squares: np.ndarray  # (L,) squared norms of the lanes' gradients; 0 where they are not measured
    saving: np.ndarray  # (4,) see Saver.flags
    stop: bool  # whether any rank received a request to stop
    synchronized: bool  # whether the ranks exchanged their reports
    divisor: int  # target tokens in this step: of all ranks if they synchronize at every step, else of this rank
    steps: int  # number of steps in the report
    joules: float = 0.0  # energy of all machines since the last report

    @property
    def tokens(self) -> int:
        """The number of target tokens in the reported steps."""
        return int(self.num_tokens.sum())

    @property
    def loss(self) -> float:
        """The mean loss over tokens, in nats. The sums of the micro-batches are added in a fixed order, so the mean does not
        depend on the number of ranks."""
        return sum_in_order(self.losses.tolist()) / max(1.0, self.tokens)


def exchange_reports(job: Job, done: Computed, seconds: float, stop: bool) -> StepReport:
    """Exchange the reports of this step with all ranks, and return them. If ranks do not synchronize at this step, keep this
    rank's report for the next exchange. Before the exchange, wait until a checkpoint has copied this rank's state, because the
    next update changes the state. `done`: the losses of this step. `seconds`: how long this rank has computed. `stop`: whether
    this rank received a request to stop. Collective over job.comm if all ranks synchronize at this step, else independent."""
    clock, step = job.services.clock, job.position.step + 1
    with clock.timed("stall"):  # the part of comm_wait without communication
        job.saver.wait_for_recent_save(step)
        job.saver.wait_for_copy()
    synchronized, rank, size = job.strategy.synchronizes_at(step), job.comm.rank, job.comm.size
    count = job.lanes.num_micro_batches
    lengths = [count, count, size, size, size, job.lanes.num_lanes, 4, 1, 1, 1]
    flat = np.zeros(sum(lengths))
    losses, num_tokens, spent, data, counts, squares, saving, stops, steps, joules = np.split(flat, np.cumsum(lengths)[:-1])
    reports_losses = job.engine.reports_loss  # if false, another rank of this replica reports the losses
    if reports_losses or not synchronized:
        losses[done.micro_batches], num_tokens[done.micro_batches] = done.losses, done.num_tokens
    data[rank], joules[0] = clock.so_far("data"), job.services.meter.pop_joules()
    spent[rank], counts[rank] = seconds, len(set(map(job.lanes.lane_of, done.micro_batches)))
    squares[list(done.lane_squares)] = list(done.lane_squares.values())
    steps[0] = rank == 0
    state, own_tokens = job.state, sum(done.num_tokens)
    if not synchronized:
        state.unreported = (0.0 if state.unreported is None else state.unreported) + flat
        state.unreported[: 2 * count * (not reports_losses)] = 0.0
        spent[:] = seconds  # the seconds of other ranks are not known without an exchange
        return StepReport(flat, losses, num_tokens, spent, data, counts, squares, saving, False, False, own_tokens, 1)
    if state.unreported is not None:
        flat += state.unreported
        state.unreported = None
    saving[:], stops[0] = job.saver.flags(), stop
    job.memory.group.wait(job.comm.Iallreduce(MPI.IN_PLACE, flat))
    divisor = int(num_tokens.sum()) if job.strategy.synchronizes_always else own_tokens
    any_stop, rest = bool(stops[0]), (int(steps[0]), float(joules[0]))
    return StepReport(flat, losses, num_tokens, spent, data, counts, squares, saving, any_stop, True, divisor, *rest)


def take_back(job: Job, report: StepReport, earlier: np.ndarray | None) -> None:
    """Remove the report of a skipped batch, but keep its energy. Also keep the reports of earlier steps that were exchanged at
    the same time, so that the next exchange reports these steps again. `report`: the result of exchange_reports(). `earlier`:
    the value of state.unreported before the call of exchange_reports(). Independent."""
    state, kept = job.state, np.zeros_like(report.numbers) if earlier is None else earlier.copy()
    # the last number is the energy
    kept[-1] = report.joules * (job.comm.rank == 0) if state.unreported is None else state.unreported[-1]
    state.unreported = kept


def noise_of(job: Job, report: StepReport, grad_norm: float) -> Noise | None:
    """Return the gradient noise of this step. Return None if the gradient norms of lanes (sequences of micro-batches) were not
    measured, or if the noise cannot be estimated from these norms. Independent."""
    if not report.lane_squares.any():
        return None
    tokens = [int(report.num_tokens[list(job.lanes.micro_batches(lane))].sum()) for lane in range(job.lanes.num_lanes)]
    nominal = job.engine.nominal_tokens  # losses were divided by this number before backward
    squares = [s * (nominal / n) ** 2 if n else 0.0 for s, n in zip(report.lane_squares.tolist(), tokens, strict=True)]
    return estimate(squares, tokens, grad_norm**2)

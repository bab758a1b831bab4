"""Predicts the time to reach the same loss with other batch sizes and numbers of ranks, from measurements of a run. Pure.

With b tokens per step, a run needs S(b) = S_min (1 + B_noise / b) steps and E(b) = b S(b) tokens to reach a loss. S_min is the
smallest number of steps, and E_min the smallest number of tokens, over all b. The formula follows from
(S/S_min - 1)(E/E_min - 1) = 1 and B_noise = E_min / S_min (McCandlish et al. 2018, section 2.3).

The time of a step is the compute time of the rank with the most micro-batches, plus the time of communication and the time of
the update. The last two times do not depend on the batch. A lane is a fixed sequence of micro-batches. Ranks compute whole
lanes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpidp.data.lanes import Lanes

MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # multiples of the run's batch size


@dataclass(frozen=True)
class StepTimes:
    """The measured times of a step for one number of ranks."""

    ranks: int
    micro_batch: float  # seconds of one micro-batch: forward, backward, and waiting for data
    comm: float  # seconds per step, without the time of waiting for ranks with more micro-batches
    update: float  # seconds per step


@dataclass(frozen=True)
class Learned:
    """The number of steps that a run needed to reach a loss, and the batch size and gradient noise scale of the run."""

    steps: float  # number of steps to reach the loss
    tokens_a_step: float  # batch size B
    lanes: Lanes
    noise_scale_tokens: float  # B_noise

    @property
    def fewest_steps(self) -> float:
        """S_min, the number of steps that an infinitely large batch would need."""
        return self.steps / (1 + self.noise_scale_tokens / self.tokens_a_step)


@dataclass(frozen=True)
class Cell:
    """The predicted time for one batch size and one number of ranks."""

    multiple: float  # batch size, relative to that of the run
    ranks: int
    seconds: float  # predicted time to reach the loss

    @property
    def at(self) -> tuple[float, int]:
        """The position of the cell in the table: (multiple, ranks)."""
        return self.multiple, self.ranks

    @property
    def rank_seconds(self) -> float:
        """The cost in rank-seconds: seconds x ranks."""
        return self.seconds * self.ranks


@dataclass(frozen=True)
class BatchRow:
    """The predictions for one batch size, with a cell for each number of ranks that has at least one lane per rank."""

    multiple: float
    lanes: Lanes
    tokens: float  # per step
    steps: float  # predicted number of steps to reach the loss
    cells: tuple[Cell, ...]


def scaled(lanes: Lanes, multiple: float) -> Lanes | None:
    """Return the lanes of a global batch that is `multiple` times as large as that of `lanes`. The size of a micro-batch stays
    the same, and the number of micro-batches per lane stays about the same. Return None if the batch is not a whole number of
    sequences, or is smaller than a micro-batch. Pure."""
    sequences = lanes.global_batch * multiple
    if sequences != int(sequences) or sequences < lanes.micro_batch:
        return None
    most = -(-int(sequences) // lanes.micro_batch)
    return Lanes(int(sequences), lanes.micro_batch, max(1, min(most, round(lanes.num_lanes * multiple))))


def most_micro_batches(lanes: Lanes, ranks: int) -> int:
    """Return the number of micro-batches of the rank that has the most micro-batches. The other ranks wait for this rank.
    Pure."""
    cuts = [rank * lanes.num_lanes // ranks * lanes.num_micro_batches // lanes.num_lanes for rank in range(ranks + 1)]
    return max(b - a for a, b in zip(cuts, cuts[1:], strict=False))


def _between(points: Sequence[tuple[int, float]], ranks: int, grows: bool = False) -> float:
    """Return the value at `ranks`, interpolated linearly in log2(ranks) between `points`. points: (ranks, value), sorted by
    ranks. Outside the points, return the nearest value. grows: whether to extrapolate beyond the last point, if the last two
    values rise."""
    if ranks <= points[0][0]:
        return points[0][1]
    for (low, a), (high, b) in zip(points, points[1:], strict=False):
        if ranks <= high:
            return a + (b - a) * math.log2(ranks / low) / math.log2(high / low)
    last, value = points[-1]
    if not grows or len(points) == 1:
        return value
    before, earlier = points[-2]
    return value + max(0.0, value - earlier) * math.log2(ranks / last) / math.log2(last / before)


def seconds_at(measured: Sequence[StepTimes], ranks: int) -> StepTimes:
    """Return the step times on `ranks` ranks, interpolated between measurements. measured: one or more measurements, each with a
    different number of ranks. Runs on one rank do not communicate. For several ranks, the time of communication is therefore
    taken from runs on several ranks, or is 0 if there are none. Pure."""
    measured = sorted(measured, key=lambda one: one.ranks)
    comm = [(one.ranks, one.comm) for one in measured if one.ranks > 1]
    if ranks == 1:
        comm = [(1, one.comm) for one in measured if one.ranks == 1]
    return StepTimes(
        ranks,
        _between([(one.ranks, one.micro_batch) for one in measured], ranks),
        _between(comm, ranks, grows=True) if comm else 0.0,
        _between([(one.ranks, one.update) for one in measured], ranks),
    )


def step_seconds(lanes: Lanes, measured: Sequence[StepTimes], ranks: int) -> float:
    """Return the predicted time in seconds of one step with these lanes on `ranks` ranks. Pure."""
    at = seconds_at(measured, ranks)
    return most_micro_batches(lanes, ranks) * at.micro_batch + at.comm + at.update


def predict(learned: Learned, measured: Sequence[StepTimes], ranks: Sequence[int]) -> list[BatchRow]:
    """Return the predictions, with one row per batch size. ranks: the numbers of ranks for which a row has cells. Pure."""
    rows = []
    for multiple in MULTIPLES:
        lanes = scaled(learned.lanes, multiple)
        if lanes is None:
            continue
        tokens = learned.tokens_a_step * multiple
        steps = learned.fewest_steps * (1 + learned.noise_scale_tokens / tokens)
        cells = [Cell(multiple, p, steps * step_seconds(lanes, measured, p)) for p in ranks if p <= lanes.num_lanes]
        rows.append(BatchRow(multiple, lanes, tokens, steps, tuple(cells)))
    return rows


def best_at(rows: Sequence[BatchRow], ranks: int) -> Cell | None:
    """Return the cell of the fastest batch size on `ranks` ranks, or None if no batch has enough lanes. Pure."""
    cells = [cell for row in rows for cell in row.cells if cell.ranks == ranks]
    return min(cells, key=lambda cell: cell.seconds, default=None)

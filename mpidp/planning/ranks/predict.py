"""From what a run measured to the time other batch sizes and numbers of ranks would take to the same loss. Pure.

Steps to a loss at b tokens a step: S(b) = S_min (1 + B_noise / b), from (S/S_min - 1)(E/E_min - 1) = 1 with E = b S tokens and
B_noise = E_min / S_min (McCandlish et al. 2018, section 2.3). Seconds a step: those of the rank with the most micro-batches,
plus communication and update, which do not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpidp.data.lanes import Lanes

MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of the present batch


@dataclass(frozen=True)
class Seconds:
    """What one number of ranks was measured to take."""

    ranks: int
    micro_batch: float  # s, forward and backward of one micro-batch and the wait for its data
    comm: float  # s a step, beyond the wait for ranks that have more micro-batches
    update: float  # s a step


@dataclass(frozen=True)
class Learned:
    """How far a run came, and with what."""

    steps: float  # to the loss
    tokens_a_step: float  # B
    lanes: Lanes
    noise_scale_tokens: float

    @property
    def fewest_steps(self) -> float:
        """S_min: with a batch without end."""
        return self.steps / (1 + self.noise_scale_tokens / self.tokens_a_step)


@dataclass(frozen=True)
class Cell:
    """One batch size on one number of ranks."""

    multiple: float  # of the present batch
    ranks: int
    seconds: float  # predicted, to the loss

    @property
    def at(self) -> tuple[float, int]:
        """Its place in the table."""
        return self.multiple, self.ranks

    @property
    def rank_seconds(self) -> float:
        """What it costs."""
        return self.seconds * self.ranks


@dataclass(frozen=True)
class Row:
    """One batch size; its cells are those numbers of ranks that have a lane each."""

    multiple: float
    lanes: Lanes
    tokens: float  # a step
    steps: float  # predicted, to the loss
    cells: tuple[Cell, ...]


def scaled(lanes: Lanes, multiple: float) -> Lanes | None:
    """The cut of a batch `multiple` times as large, with the same micro-batches and about as many of them a lane; None where
    that is not a whole number of sequences, or less than a micro-batch. Pure."""
    sequences = lanes.global_batch * multiple
    if sequences != int(sequences) or sequences < lanes.micro_batch:
        return None
    most = -(-int(sequences) // lanes.micro_batch)
    return Lanes(int(sequences), lanes.micro_batch, max(1, min(most, round(lanes.num_lanes * multiple))))


def most_micro_batches(lanes: Lanes, ranks: int) -> int:
    """Of any rank: the others wait for it. Pure."""
    cuts = [rank * lanes.num_lanes // ranks * lanes.num_micro_batches // lanes.num_lanes for rank in range(ranks + 1)]
    return max(b - a for a, b in zip(cuts, cuts[1:], strict=False))


def _between(points: Sequence[tuple[int, float]], ranks: int, grows: bool = False) -> float:
    """Linear in log2 of ranks between measured points (sorted by ranks), the nearest one's outside; grows: beyond the last, as
    between the last two when that rises."""
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


def seconds_at(measured: Sequence[Seconds], ranks: int) -> Seconds:
    """Measured, or guessed from the measured numbers of ranks (at least one, none twice). Communication: at one rank nothing
    travels, so only runs on several ranks say what it costs on others; none such, and it is 0. Pure."""
    measured = sorted(measured, key=lambda one: one.ranks)
    comm = [(one.ranks, one.comm) for one in measured if one.ranks > 1]
    if ranks == 1:
        comm = [(1, one.comm) for one in measured if one.ranks == 1]
    return Seconds(
        ranks,
        _between([(one.ranks, one.micro_batch) for one in measured], ranks),
        _between(comm, ranks, grows=True) if comm else 0.0,
        _between([(one.ranks, one.update) for one in measured], ranks),
    )


def step_seconds(lanes: Lanes, measured: Sequence[Seconds], ranks: int) -> float:
    """Of one step of this batch. Pure."""
    at = seconds_at(measured, ranks)
    return most_micro_batches(lanes, ranks) * at.micro_batch + at.comm + at.update


def predict(learned: Learned, measured: Sequence[Seconds], ranks: Sequence[int]) -> list[Row]:
    """The table, by batch size. Pure."""
    rows = []
    for multiple in MULTIPLES:
        lanes = scaled(learned.lanes, multiple)
        if lanes is None:
            continue
        tokens = learned.tokens_a_step * multiple
        steps = learned.fewest_steps * (1 + learned.noise_scale_tokens / tokens)
        cells = [Cell(multiple, p, steps * step_seconds(lanes, measured, p)) for p in ranks if p <= lanes.num_lanes]
        rows.append(Row(multiple, lanes, tokens, steps, tuple(cells)))
    return rows


def best_at(rows: Sequence[Row], ranks: int) -> Cell | None:
    """The batch that is fastest on so many ranks; None when no batch has lanes enough. Pure."""
    cells = [cell for row in rows for cell in row.cells if cell.ranks == ranks]
    return min(cells, key=lambda cell: cell.seconds, default=None)

"""Estimates the gradient noise scale from the gradient norms of lanes (fixed sequences of micro-batches). The noise scale is a
batch size in tokens. Beyond this size, a larger batch brings little benefit. Pure.

Lane l has n_l tokens and the mean gradient G_l. The global batch has B = sum n_l tokens and the mean gradient G. Let g be the
true gradient, and Sigma the covariance of one token's gradient. If tokens are independent, then E|G_l|^2 = |g|^2 + tr(Sigma) /
n_l and E|G|^2 = |g|^2 + tr(Sigma) / B. McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", sections 2.2 and
A.1, solve these equations for two batch sizes. Here every lane is a small batch, and lanes may have different sizes.

The tokens of one sequence are not independent. Therefore the result is the noise of whole lanes, expressed in tokens. It is
valid for larger batches that consist of more lanes of the same kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Noise:
    """Unbiased estimates of signal and noise in one step, or their means over several steps. signal_square can be negative."""

    signal_square: float  # |g|^2, squared norm of the gradient of the mean loss per token
    trace: float  # tr(Sigma) of the gradient of one token, in the unit of signal_square times tokens

    @property
    def noise_scale_tokens(self) -> float | None:
        """The noise scale tr(Sigma) / |g|^2 in tokens (B_simple, section 2.2), or None if signal_square is not positive."""
        if not (self.signal_square > 0 and self.trace >= 0):
            return None
        scale = self.trace / self.signal_square
        return scale if math.isfinite(scale) else None


def estimate(lane_squares: Sequence[float], lane_tokens: Sequence[int], batch_square: float) -> Noise | None:
    """Return an unbiased estimate of the noise of one global batch. Return None if fewer than two lanes have tokens, or if a
    number is not finite.

    lane_squares: |G_l|^2 of each lane. lane_tokens: the number n_l of target tokens of each lane. batch_square: |G|^2. Raises
    ValueError if the lists have different lengths or a count is negative. Pure.

    For L lanes, sum n_l |G_l|^2 - B |G|^2 has the expected value (L - 1) tr(Sigma). If all lanes have the same size, the results
    are the paper's S and |G|^2 (section A.1). The paper's B_small is then the size of a lane, and its B_big is B. The result
    does not depend on the order of the lanes.
    """
    if len(lane_squares) != len(lane_tokens) or any(n < 0 for n in lane_tokens):
        raise ValueError(f"{len(lane_squares)} squares and {len(lane_tokens)} token counts. Give one token count of at least "
                         "0 for each square")
    lanes = [(square, n) for square, n in zip(lane_squares, lane_tokens, strict=True) if n]
    if len(lanes) < 2 or not all(math.isfinite(square) for square in (*(s for s, _ in lanes), batch_square)):
        return None
    batch_tokens = sum(n for _, n in lanes)
    try:
        within = math.fsum([*(n * square for square, n in lanes), -batch_tokens * batch_square])
    except OverflowError:
        return None
    trace = max(0.0, within) / (len(lanes) - 1)  # `within` is a sum of squares, which only rounding can make negative
    signal_square = batch_square - trace / batch_tokens
    return Noise(signal_square, trace) if math.isfinite(signal_square) else None


def mean(noises: Sequence[Noise]) -> Noise | None:
    """Return the means of signal_square and of trace, or None for an empty list. A mean of the quotients trace / signal_square
    would be biased (section A.1). Pure."""
    if not noises:
        return None
    return Noise(math.fsum(n.signal_square for n in noises) / len(noises), math.fsum(n.trace for n in noises) / len(noises))


def interval(noises: Sequence[Noise], blocks: int = 10) -> tuple[float, float] | None:
    """Return (low, high) around the noise scale of the mean of `noises`, in tokens. Each end is about two standard errors away.

    The standard error of the scale's logarithm is estimated by a jackknife (Efron & Stein 1981). `noises` is divided into
    `blocks` groups of consecutive measurements. For each group, the noise scale is computed from all other groups. Returns None
    if there are fewer than four measurements or groups, or if one of these noise scales is undefined. Pure.
    """
    whole = mean(noises)
    scale = whole.noise_scale_tokens if whole else None
    blocks = min(blocks, len(noises))
    if blocks < 4 or not scale:
        return None
    logs = []
    for i in range(blocks):
        rest = mean([*noises[: i * len(noises) // blocks], *noises[(i + 1) * len(noises) // blocks :]])
        without = rest.noise_scale_tokens if rest else None
        if not without:
            return None
        logs.append(math.log(without))
    centre = math.fsum(logs) / blocks
    error = math.sqrt((blocks - 1) / blocks * math.fsum((x - centre) ** 2 for x in logs))
    return scale * math.exp(-min(2 * error, 50.0)), scale * math.exp(min(2 * error, 50.0))


@dataclass
class NoiseAverage:
    """Running averages of signal_square and trace (section A.1). The fields are the whole state for a checkpoint:
    NoiseAverage(**asdict(average)) continues with the same bits. Independent."""

    decay: float = 0.95  # weight of earlier measurements; the averages extend over about 1 / (1 - decay) measurements
    signal_square: float = 0.0
    trace: float = 0.0
    weight: float = 0.0  # total weight of the n measurements so far, 1 - decay^n

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay {self.decay} must be at least 0 and below 1")

    def add(self, noise: Noise | None) -> None:
        """Add a measurement. If `noise` is None or not finite, do nothing."""
        if noise is None or not (math.isfinite(noise.signal_square) and math.isfinite(noise.trace)):
            return
        self.signal_square = self.decay * self.signal_square + (1 - self.decay) * noise.signal_square
        self.trace = self.decay * self.trace + (1 - self.decay) * noise.trace
        self.weight = self.decay * self.weight + (1 - self.decay)

    @property
    def noise(self) -> Noise | None:
        """The averages with bias correction, as in Adam, or None before the first measurement."""
        return Noise(self.signal_square / self.weight, self.trace / self.weight) if self.weight else None

    @property
    def noise_scale_tokens(self) -> float | None:
        """The noise scale of the averages in tokens. It is None before the first measurement, and while signal_square is not
        positive."""
        return self.noise.noise_scale_tokens if self.noise else None

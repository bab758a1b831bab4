"""The gradient noise scale from the norms of lanes: how many tokens a batch needs before more of them are wasted. Pure.

A lane of n_l tokens has the mean gradient G_l, the global batch of B = sum n_l tokens the mean gradient G. When tokens are
drawn independently, E|G_l|^2 = |g|^2 + tr(Sigma) / n_l and E|G|^2 = |g|^2 + tr(Sigma) / B, with g the true gradient and
Sigma the covariance of one token's gradient. McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", sections
2.2 and A.1, solve this for two batch sizes; here every lane is a small batch, and lanes may hold different numbers of tokens.

Tokens of one sequence are not independent. What comes out is the noise of lanes, said in tokens, which is what a batch made
of more such lanes is about; it is not the variance over single tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Noise:
    """Estimates of one step, or means of many. Both are unbiased, so signal_square may be negative: average before dividing."""

    signal_square: float  # |g|^2, squared gradient of the mean loss a token
    trace: float  # tr(Sigma), of the gradient of one token; its square over tokens is that of signal_square

    @property
    def noise_scale_tokens(self) -> float | None:
        """tr(Sigma) / |g|^2, tokens (B_simple, section 2.2); None while the signal is not above the noise."""
        if not (self.signal_square > 0 and self.trace >= 0):
            return None
        scale = self.trace / self.signal_square
        return scale if math.isfinite(scale) else None


def estimate(lane_squares: Sequence[float], lane_tokens: Sequence[int], batch_square: float) -> Noise | None:
    """Unbiased Noise of one global batch from |G_l|^2 of its lanes, their target tokens and |G|^2. Pure.

    sum n_l |G_l|^2 - B |G|^2 = sum n_l |G_l - G|^2 has the mean (L - 1) tr(Sigma) for any n_l: each lane counts by its tokens,
    which is the pooled variance of least variance for Gaussian gradients. With equal lanes these are the paper's S and |G|^2
    (section A.1) with B_small a lane and B_big the batch. Lanes without a target token say nothing and are left out.

    None when fewer than two lanes have tokens, or a number is not finite. ValueError when the lists do not belong together.
    The sums are exact before one rounding (fsum): they depend neither on the order of lanes nor on who holds them.
    """
    if len(lane_squares) != len(lane_tokens) or any(n < 0 for n in lane_tokens):
        raise ValueError(f"{len(lane_squares)} squares and {len(lane_tokens)} token counts, of which none may be negative")
    lanes = [(square, n) for square, n in zip(lane_squares, lane_tokens, strict=True) if n]
    if len(lanes) < 2 or not all(math.isfinite(square) for square in (*(s for s, _ in lanes), batch_square)):
        return None
    batch_tokens = sum(n for _, n in lanes)
    try:
        within = math.fsum([*(n * square for square, n in lanes), -batch_tokens * batch_square])
    except OverflowError:
        return None
    trace = max(0.0, within) / (len(lanes) - 1)  # a sum of squares: below zero by rounding alone
    signal_square = batch_square - trace / batch_tokens
    return Noise(signal_square, trace) if math.isfinite(signal_square) else None


def mean(noises: Sequence[Noise]) -> Noise | None:
    """Signal and trace averaged apart, since the mean of their quotients would be biased (section A.1); None of none. Pure."""
    if not noises:
        return None
    return Noise(math.fsum(n.signal_square for n in noises) / len(noises), math.fsum(n.trace for n in noises) / len(noises))


def interval(noises: Sequence[Noise], blocks: int = 10) -> tuple[float, float] | None:
    """About two standard errors to either side of the noise scale of the mean, in tokens, by a jackknife over consecutive
    blocks, of the logarithm (Efron & Stein 1981). None when there are fewer than four measurements, or some nine tenths of them
    do not have a noise scale: then it is not known within any bounds. Pure."""
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
    """Running averages of signal and trace, apart (section A.1). Its fields are plain numbers and its whole state, for a
    checkpoint: NoiseAverage(**asdict(average)) goes on with the same bits. Independent."""

    decay: float = 0.95  # weight of the past at each measurement: it remembers about 1 / (1 - decay) of them
    signal_square: float = 0.0
    trace: float = 0.0
    weight: float = 0.0  # of what was added so far: 1 - decay^n

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay {self.decay} must be at least 0 and below 1")

    def add(self, noise: Noise | None) -> None:
        """One measurement; None and numbers that are not finite are left out."""
        if noise is None or not (math.isfinite(noise.signal_square) and math.isfinite(noise.trace)):
            return
        self.signal_square = self.decay * self.signal_square + (1 - self.decay) * noise.signal_square
        self.trace = self.decay * self.trace + (1 - self.decay) * noise.trace
        self.weight = self.decay * self.weight + (1 - self.decay)

    @property
    def noise(self) -> Noise | None:
        """The averages, not drawn towards the zeros they began with (as Adam's moments are not); None before the first."""
        return Noise(self.signal_square / self.weight, self.trace / self.weight) if self.weight else None

    @property
    def noise_scale_tokens(self) -> float | None:
        """Tokens; None until the averages are positive."""
        return self.noise.noise_scale_tokens if self.noise else None

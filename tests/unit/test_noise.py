"""Laws of the gradient noise scale: unbiased for lanes of any size, equal to the paper's for equal lanes, and None if it is
unknown."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from mpidp.metrics.gradient_noise import Noise, NoiseAverage, estimate, interval, mean

DIM = 30
TRUE = np.linspace(-0.4, 0.4, DIM)  # the expected gradient of a token
SPREAD = np.linspace(0.5, 3.0, DIM)  # standard deviation of one token's gradient, by coordinate
SIGNAL_SQUARE, TRACE = float((TRUE**2).sum()), float((SPREAD**2).sum())


def draw(tokens: list[int], rng: np.random.Generator) -> Noise | None:
    """Draw the lanes' mean gradients of one step, with the covariance of a mean over so many tokens."""
    lanes = [TRUE + rng.standard_normal(DIM) * SPREAD / math.sqrt(n) for n in tokens]
    batch = np.average(lanes, axis=0, weights=tokens)
    return estimate([float(lane @ lane) for lane in lanes], tokens, float(batch @ batch))


@pytest.mark.parametrize("tokens", [[16] * 8, [3, 50], [1, 2, 5, 40, 100], [64, 64, 64, 7]])
def test_both_estimates_are_unbiased(tokens: list[int]) -> None:
    rng = np.random.default_rng(1337)
    drawn = [noise for _ in range(4000) if (noise := draw(tokens, rng))]
    for values, true in (([n.signal_square for n in drawn], SIGNAL_SQUARE), ([n.trace for n in drawn], TRACE)):
        error = float(np.std(values)) / math.sqrt(len(values))
        assert abs(float(np.mean(values)) - true) < 4 * error
        assert error < 0.2 * true  # the test is able to detect a bias
    scale = mean(drawn).noise_scale_tokens  # type: ignore[union-attr]
    assert scale == pytest.approx(TRACE / SIGNAL_SQUARE, rel=0.25)


def test_many_tokens_drawn_one_by_one() -> None:
    """Token gradients are drawn, and summed over lanes as in training, instead of using the formula for the mean."""
    rng = np.random.default_rng(7)
    cuts, drawn = [0, 10, 30, 33, 64], []
    for _ in range(2000):
        tokens = TRUE + rng.standard_normal((64, DIM)) * SPREAD
        lanes = [tokens[a:b].mean(axis=0) for a, b in zip(cuts, cuts[1:], strict=False)]
        batch = tokens.mean(axis=0)
        noise = estimate([float(lane @ lane) for lane in lanes], list(np.diff(cuts)), float(batch @ batch))
        assert noise is not None
        drawn.append(noise)
    whole = mean(drawn)
    assert whole is not None
    assert whole.trace == pytest.approx(TRACE, rel=0.02) and whole.signal_square == pytest.approx(SIGNAL_SQUARE, rel=0.1)


def test_equal_lanes_give_the_papers_estimates() -> None:
    """Section A.1: |G|^2 = (B b^2 - n s^2) / (B - n) and S = (s^2 - b^2) / (1/n - 1/B), with the mean of the lanes' squares."""
    squares, n, batch_square = [3.0, 4.5, 2.75, 5.0], 128, 1.25
    small, big = sum(squares) / 4, 4 * n
    noise = estimate(squares, [n] * 4, batch_square)
    assert noise is not None
    assert noise.signal_square == pytest.approx((big * batch_square - n * small) / (big - n))
    assert noise.trace == pytest.approx((small - batch_square) / (1 / n - 1 / big))


def test_the_order_of_lanes_changes_no_bit() -> None:
    rng = np.random.default_rng(3)
    squares = rng.random(64) * 10.0 ** rng.integers(-9, 9, 64)
    lanes = [(float(s), int(n)) for s, n in zip(squares, rng.integers(1, 999, 64), strict=True)]
    first = estimate([s for s, _ in lanes], [n for _, n in lanes], 1e-3)
    for _ in range(5):
        rng.shuffle(lanes)
        assert estimate([s for s, _ in lanes], [int(n) for _, n in lanes], 1e-3) == first


def test_units() -> None:
    squares, tokens, batch = [3.0, 4.0, 2.5], [10, 20, 30], 2.0
    one = estimate(squares, tokens, batch)
    louder = estimate([16 * s for s in squares], tokens, 16 * batch)  # gradients 4 times as large
    longer = estimate(squares, [7 * n for n in tokens], batch)  # each token's gradient a seventh as large
    assert one and louder and longer and one.noise_scale_tokens
    assert (louder.signal_square, louder.trace) == pytest.approx((16 * one.signal_square, 16 * one.trace))
    assert (longer.signal_square, longer.trace) == pytest.approx((one.signal_square, 7 * one.trace))
    assert louder.noise_scale_tokens == pytest.approx(one.noise_scale_tokens)
    assert longer.noise_scale_tokens == pytest.approx(7 * one.noise_scale_tokens)


def test_a_lane_without_tokens_says_nothing() -> None:
    assert estimate([3.0, math.nan, 4.0], [10, 0, 20], 2.0) == estimate([3.0, 4.0], [10, 20], 2.0)


@pytest.mark.parametrize(
    ("squares", "tokens", "batch"),
    [
        ([], [], 1.0), ([1.0], [8], 1.0), ([1.0, 2.0], [8, 0], 1.0), ([1.0, math.nan], [8, 8], 1.0),
        ([1.0, math.inf], [8, 8], 1.0), ([1.0, 2.0], [8, 8], math.nan), ([1e308, 1e308], [99, 99], 1.0),
    ],
)  # fmt: skip
def test_what_cannot_be_estimated_is_none(squares: list[float], tokens: list[int], batch: float) -> None:
    assert estimate(squares, tokens, batch) is None


def test_lists_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="2 squares and 3 token counts"):
        estimate([1.0, 2.0], [1, 2, 3], 1.0)
    with pytest.raises(ValueError, match="at least 0"):
        estimate([1.0, 2.0], [1, -2], 1.0)


def test_lanes_that_agree_have_no_noise_not_even_below_zero() -> None:
    square = 0.1 + 0.2
    noise = estimate([square] * 7, [3, 1, 4, 1, 5, 9, 2], square * (1 + 1e-15))
    assert noise is not None and noise.trace == 0.0 and noise.noise_scale_tokens == 0.0


def test_a_signal_below_the_noise_has_no_scale() -> None:
    noise = estimate([10.0, 10.0], [8, 8], 1.0)  # two lanes that nearly cancel
    assert noise is not None and noise.signal_square < 0 and noise.trace > 0 and noise.noise_scale_tokens is None
    assert Noise(5e-324, 1e300).noise_scale_tokens is None  # the quotient exceeds the range of floats
    assert Noise(math.nan, 1.0).noise_scale_tokens is None


def test_averages_are_divided_not_quotients_averaged() -> None:
    average = NoiseAverage(decay=0.5)
    assert average.noise is None and average.noise_scale_tokens is None
    average.add(Noise(1.0, 10.0))
    assert average.noise == Noise(1.0, 10.0)  # not biased towards zero
    average.add(Noise(3.0, 10.0))
    assert average.noise_scale_tokens == pytest.approx(10.0 / ((1 + 2 * 3) / 3))


def test_an_average_waits_until_it_is_positive_and_passes_over_what_is_not_finite() -> None:
    average = NoiseAverage(decay=0.5)
    average.add(Noise(-1.0, 10.0))
    assert average.noise_scale_tokens is None
    for unusable in (None, Noise(math.nan, 1.0), Noise(1.0, math.inf)):
        before = asdict(average)
        average.add(unusable)
        assert asdict(average) == before
    average.add(Noise(2.0, 10.0))
    assert average.noise_scale_tokens == pytest.approx(10.0 / 1.0)


def test_an_average_goes_on_from_its_fields_with_the_same_bits() -> None:
    rng = np.random.default_rng(5)
    noises = [Noise(float(a), float(b)) for a, b in rng.random((20, 2))]
    whole, first = NoiseAverage(), NoiseAverage()
    for noise in noises:
        whole.add(noise)
    for noise in noises[:11]:
        first.add(noise)
    resumed = NoiseAverage(**asdict(first))
    for noise in noises[11:]:
        resumed.add(noise)
    assert resumed == whole


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_that_never_forgets_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        NoiseAverage(decay)


def test_the_interval_holds_the_truth_about_as_often_as_two_standard_errors_do() -> None:
    rng = np.random.default_rng(11)
    held, wide, tokens = 0, [], [256] * 8
    for _ in range(200):
        bounds = interval([noise for _ in range(40) if (noise := draw(tokens, rng))])
        assert bounds is not None
        held += bounds[0] <= TRACE / SIGNAL_SQUARE <= bounds[1]
        wide.append(math.log(bounds[1] / bounds[0]))
    assert 170 <= held <= 200
    more = interval([noise for _ in range(640) if (noise := draw(tokens, rng))])
    assert more is not None and math.log(more[1] / more[0]) < 0.7 * float(np.mean(wide))


def test_no_interval_of_too_little() -> None:
    assert interval([]) is None and mean([]) is None
    assert interval([Noise(1.0, 2.0)] * 3) is None
    assert interval([Noise(-1.0, 2.0)] * 20) is None
    assert interval([*[Noise(-0.1, 2.0)] * 9, Noise(1.0, 2.0)]) is None  # positive because of a single measurement
    bounds = interval([Noise(1.0, 2.0)] * 20)
    assert bounds == pytest.approx((2.0, 2.0))

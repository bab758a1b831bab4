"""Laws of predictions: measured values are returned unchanged, values between them are interpolated, and lanes stay whole."""

from __future__ import annotations

import pytest

from mpidp.data.lanes import Lanes
from mpidp.plan.ranks.predict import Learned, StepTimes, most_micro_batches, predict, scaled, seconds_at
from mpidp.plan.ranks.table import duration

MEASURED = [StepTimes(8, 0.3, 0.09, 0.05), StepTimes(1, 0.1, 0.001, 0.01), StepTimes(2, 0.1, 0.05, 0.03)]


def same(found: StepTimes, micro_batch: float, comm: float, update: float) -> bool:
    return (found.micro_batch, found.comm, found.update) == pytest.approx((micro_batch, comm, update))


def test_seconds_are_linear_in_log2_of_ranks() -> None:
    assert all(seconds_at(MEASURED, one.ranks) == one for one in MEASURED)
    assert same(seconds_at(MEASURED, 4), 0.2, 0.07, 0.04)


def test_beyond_the_last_communication_goes_on_growing_and_never_falls() -> None:
    assert same(seconds_at(MEASURED, 32), 0.3, 0.13, 0.05)
    assert seconds_at([StepTimes(2, 0.1, 0.05, 0.0), StepTimes(4, 0.1, 0.04, 0.0)], 64).comm == 0.04


def test_what_one_run_says_of_communication() -> None:
    several, alone = MEASURED[:1], MEASURED[1:2]
    assert [seconds_at(several, ranks).comm for ranks in (1, 2, 8, 64)] == [0.0, 0.09, 0.09, 0.09]
    assert [seconds_at(alone, ranks).comm for ranks in (1, 4)] == [0.001, 0.0]  # one rank does not communicate


@pytest.mark.parametrize("noise_scale", [0.1, 3000.0, 1e9])
def test_steps_and_tokens_lie_on_the_papers_hyperbola(noise_scale: float) -> None:
    """(S / S_min - 1)(E / E_min - 1) = 1 for every batch (section 2.3), and the run's own batch takes the measured number of
    steps."""
    learned = Learned(400, 2048, Lanes(16, 2, 8), noise_scale)
    rows = predict(learned, MEASURED, [1])
    for row in rows:
        steps, tokens = row.steps / learned.fewest_steps, row.steps * row.tokens / (learned.fewest_steps * noise_scale)
        assert (steps - 1) * (tokens - 1) == pytest.approx(1.0, rel=1e-4)
    assert next(row.steps for row in rows if row.multiple == 1) == pytest.approx(400)


@pytest.mark.parametrize("lanes", [Lanes(16, 2, 8), Lanes(17, 2, 3), Lanes(30, 4, 5), Lanes(1, 1, 1)])
def test_cuts_of_other_batches(lanes: Lanes) -> None:
    assert scaled(lanes, 1.0) == lanes
    for ranks in range(1, lanes.num_lanes + 1):
        shares = [sum(len(lanes.micro_batches(lane)) for lane in lanes.of_rank(r, ranks)) for r in range(ranks)]
        assert most_micro_batches(lanes, ranks) == max(shares)
    assert scaled(lanes, 0.25) == (Lanes(4, 2, 2) if lanes.global_batch == 16 else None)


@pytest.mark.parametrize(
    ("value", "words"), [(0.5, "0.5 s"), (42.0, "42 s"), (600.0, "10 min"), (7200.0, "2 h"), (8.64e6, "100.0 d")]
)
def test_durations(value: float, words: str) -> None:
    assert duration(value) == words

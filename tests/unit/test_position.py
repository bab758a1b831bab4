"""Laws of a run's position: every batch is counted once, and a few outliers do not change the usual gradient norm."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpidp.strategies.protocol import StepStats
from mpidp.training.state import KNOWN_AFTER, REMEMBERED, Position

NORMS = st.floats(1e-6, 1e6)


@given(st.lists(st.tuples(st.booleans(), NORMS, st.integers(1, 100))))
def test_every_batch_is_counted_once(batches: list[tuple[bool, float, int]]) -> None:
    at = Position()
    for number, (skipped, norm, tokens) in enumerate(batches):
        assert at.batch == number
        at.count(StepStats(norm, skipped), tokens)
    learned = [one for one in batches if not one[0]]
    assert (at.step, at.tokens) == (len(learned), sum(tokens for _, _, tokens in learned))
    assert at.norms == [norm for _, norm, _ in learned][-REMEMBERED:]
    in_a_row = next((i for i, (skipped, _, _) in enumerate(reversed(batches)) if not skipped), len(batches))
    assert at.skipped_in_a_row == in_a_row and at.skipped == len(batches) - len(learned)


@given(st.lists(NORMS, max_size=60), st.floats(1.5, 100.0))
def test_a_limit_is_set_by_the_middle_of_the_last_norms(norms: list[float], spike: float) -> None:
    at = Position()
    for norm in norms:
        at.count(StepStats(norm, skipped=False), 1)
    last = sorted(norms[-REMEMBERED:])
    assert at.norm_limit(0.0) == math.inf
    if len(norms) < KNOWN_AFTER:
        assert at.norm_limit(spike) == math.inf
        return
    assert at.norm_limit(spike) == spike * last[(len(last) - 1) // 2]
    assert Position(**json.loads(json.dumps(asdict(at)))).norm_limit(spike) == at.norm_limit(spike)


@pytest.mark.parametrize("odd", [0, 1, 15])
def test_a_few_odd_ones_do_not_move_it(odd: int) -> None:
    at = Position()
    for number in range(REMEMBERED):
        at.count(StepStats(1e9 if number < odd else 2.0, skipped=False), 1)
    assert at.norm_limit(3.0) == 6.0


def test_batches_that_are_passed_over() -> None:
    at = Position(step=5, skipped=2, skipped_in_a_row=2)
    at.skip_to(11)
    assert (at.batch, at.step, at.skipped, at.skipped_in_a_row) == (11, 5, 6, 0)


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    for first in (math.nan, math.inf):
        at = Position()
        at.evaluated(first)
        assert at.evaluations_since_best == 1
        at.evaluated(3.0)
        assert at.best_val_loss == 3.0 and at.evaluations_since_best == 0
        at.evaluated(math.nan)
        assert at.best_val_loss == 3.0 and at.evaluations_since_best == 1


def test_a_best_loss_of_nan_in_a_checkpoint_is_replaced() -> None:
    at = Position(best_val_loss=math.nan, val_loss=math.nan, evaluations_since_best=4)
    at.evaluated(2.0)
    assert at.best_val_loss == 2.0 and at.evaluations_since_best == 0

"""Laws of faults on purpose: what is written is what happens, and what cannot be read is said with how to write it."""

from __future__ import annotations

import pytest

from mpidp import inject
from mpidp.errors import UsageError
from mpidp.inject import EXAMPLE, VARIABLE, Delay, Faults, Flip, Wrong, asked_for, parse


def test_the_example_is_understood() -> None:
    text = EXAMPLE.partition("=")[2].strip('"')
    assert parse(text).faults == (Delay(1, 0.02), Flip(2, 5, 3, 20), Wrong(1, 7, 9))
    assert asked_for({VARIABLE: text}) == parse(text)


def test_nothing_is_asked_for_by_default() -> None:
    assert not asked_for({}) and not parse("  ") and parse("wrong:rank=0,step=1")
    with Faults().slowed():
        pass


def test_faults_are_of_a_rank_and_of_steps() -> None:
    flips = "flip:rank=1,step=5,tensor=0,bit=31 flip:rank=0,step=5,tensor=1,bit=0"
    faults = parse(f"wrong:rank=1,step=7,until=9 {flips} wrong:rank=2,step=4")
    mine = faults.of_rank(1)
    assert [step for step in range(12) if mine.wrong(step)] == [7, 8, 9]
    assert [step for step in range(12) if faults.of_rank(2).wrong(step)] == [4]
    assert mine.flips(5) == [Flip(1, 5, 0, 31)] and mine.flips(6) == [] and len(faults.flips(5)) == 2
    assert not faults.of_rank(3)


@pytest.mark.parametrize(
    ("text", "pause"),
    [("delay:rank=1,seconds=0.5", 0.5), ("delay:rank=1,factor=3", 4.0), ("delay:rank=1,seconds=1,factor=1.5", 2.0),
     ("delay:rank=1,seconds=0.25 delay:rank=1,factor=2", 2.25), ("delay:rank=0,seconds=9", None), ("wrong:rank=1,step=1", None)],
)
def test_a_delay_is_slept_after_every_micro_batch(text: str, pause: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The micro-batch takes 2 seconds of a clock that the test moves."""
    now, slept = [10.0], []
    monkeypatch.setattr(inject.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(inject.time, "sleep", slept.append)
    faults = parse(text).of_rank(1)
    for _ in range(2):
        with faults.slowed():
            now[0] += 2.0
    assert slept == ([] if pause is None else [pytest.approx(pause)] * 2)


def test_an_error_inside_is_no_reason_to_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inject.time, "sleep", lambda seconds: pytest.fail("slept"))
    with pytest.raises(KeyError), parse("delay:rank=0,seconds=1").slowed():
        raise KeyError


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dely:rank=1,seconds=1", "'dely' is none of delay, flip, wrong"),
        ("delay", "delay needs rank"),
        ("delay:rank=1", "seconds= above 0 or factor= above 1"),
        ("delay:rank=1,seconds=-1", "seconds=-1.0 must be 0 or more"),
        ("delay:rank=1,seconds=inf", "seconds=inf must"),
        ("delay:rank=1,seconds=nan", "seconds=nan must"),
        ("delay:rank=1,factor=0.5", "factor=0.5 must be 1 or more"),
        ("delay:rank=1,seconds=fast", "seconds=fast is not a number"),
        ("delay:rank=1,second=1", "delay takes rank, seconds, factor, not 'second'"),
        ("delay:rank=1,rank=2,seconds=1", "rank is said twice"),
        ("delay:rank=-1,seconds=1", "rank=-1 must be 0 or more"),
        ("delay:rank=1.5,seconds=1", "rank=1.5 is not a whole number"),
        ("flip:rank=1,step=5", "flip needs tensor, bit"),
        ("flip:rank=1,step=5,tensor=1,bit=32", "bit=32 must be in 0..31"),
        ("flip:rank=1,step=0,tensor=1,bit=3", "step=0 must be 1 or more"),
        ("flip:rank=1,step=1,tensor=-1,bit=3", "tensor=-1 must be 0 or more"),
        ("wrong:rank=1,step=7,until=6", "until=6 not below it"),
        ("wrong:rank=1,step=7, until=9", "not ''"),
        ("wrong:rank=1,step", "step= is not a whole number"),
    ],
)
def test_what_cannot_be_read_is_said_with_how_to_write_it(text: str, said: str) -> None:
    with pytest.raises(UsageError) as found:
        parse("wrong:rank=0,step=1 " + text)
    assert said in str(found.value) and EXAMPLE in str(found.value) and str(found.value).startswith(VARIABLE)

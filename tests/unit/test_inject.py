"""Laws of injected faults: a fault happens as specified, once, and an invalid specification is rejected with the syntax."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mpidp.errors import UsageError
from mpidp.faults import inject
from mpidp.faults.inject import (
    EXAMPLE,
    PHASES,
    VARIABLE,
    Fault,
    InjectedFaults,
    faults_from_environment,
    make_nan,
    make_wrong,
    parse,
)

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    text = EXAMPLE.partition("=")[2].strip('"')
    kill, delay = Fault("kill", 1, 5, "reduce", after=0.01), Fault("delay", 2, 1, factor=2.0)
    flip = Fault("flip", 0, 5, tensor=3, bit=20)
    assert parse(text).of_all_ranks == (kill, delay, flip)
    assert [parse(text, rank).of_this_rank for rank in range(4)] == [[flip], [kill], [delay], []]
    assert faults_from_environment(1, {VARIABLE: text}).of_this_rank == [kill] and not capsys.readouterr().err
    with pytest.raises(UsageError, match="='kill:.*': the job has no rank 1, only ranks 0 to 0"):
        faults_from_environment(0, {VARIABLE: text}, size=1)
    faults_from_environment(0, {VARIABLE: text})
    assert capsys.readouterr().err == f"{VARIABLE} is set: THIS RUN HAS INJECTED FAULTS: {text}\n"


def test_nothing_is_asked_for_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert not faults_from_environment(0, {}) and not parse("  ") and parse("wrong:3:1")
    assert InjectedFaults().span(1, "micro_batch", {}) is None
    InjectedFaults().enter(1, "compute")
    assert not capsys.readouterr().err


def test_glitches_and_failed_cores() -> None:
    faults = parse("wrong:1:7,until=9 wrong:1:4", 1)
    assert faults.changes_gradients and not parse("kill:1:7 delay:1:1,factor=2 flip:1:1,tensor=0,bit=0").changes_gradients
    assert [[faults.gradient_faults(step, attempt) for attempt in (0, 1)] for step in (3, 4, 4, 7, 9, 7, 10)] == [
        [[], []], [[make_wrong], []], [[], []], *[[[make_wrong]] * 2] * 3, [[], []],
    ]
    assert not parse("wrong:1:4", 2).gradient_faults(4) and parse("wrong:1:4", 2).changes_gradients


def test_so_many_batches_are_not_finite() -> None:
    faults = parse("nan:0:3,times=2")
    assert [faults.gradient_faults(step) for step in (2, 3, 3, 3, 4)] == [[], [make_nan], [make_nan], [], []]
    gradient = torch.zeros(3)
    make_wrong(0, gradient)
    assert gradient.tolist() == [1.0, 0.0, 0.0]
    make_nan(0, gradient)
    assert math.isnan(gradient[0]) and gradient[1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bit", [0, 20, 31])
def test_a_bit_is_flipped_once(bit: int) -> None:
    parameters = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
    faults = parse(f"flip:0:5,tensor=1,bit={bit}")
    for step in (4, 5, 5, 6):
        assert faults.flip(step, parameters) == parse(f"flip:0:5,tensor=1,bit={bit}", 1).flip(step, parameters) == (step == 5)
        bits = [p.detach().view(torch.int32).reshape(-1).tolist() for p in parameters]
        one = torch.ones(1).view(torch.int32).item()
        flipped = one ^ (1 << bit if bit < 31 else -(1 << 31))
        assert bits == [[one] * 6, [flipped if step > 4 else one, *[one] * 5], [one] * 6]


@pytest.mark.parametrize(
    ("text", "pause"),
    [("delay:1:1,seconds=0.5", 0.5), ("delay:1:1,factor=3", 4.0), ("delay:1:1,seconds=1,factor=1.5", 2.0),
     ("delay:1:1,seconds=0.25 delay:1:1,factor=2", 2.25), ("delay:0:1,seconds=9", None), ("wrong:1:1", None),
     ("delay:1:4,seconds=1", None), ("delay:1:1,until=2,seconds=1", None), ("delay:1:3,until=3,seconds=1", 1.0)],
)
def test_a_delay_is_slept_after_every_micro_batch(text: str, pause: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In step 3. The micro-batch takes 2 seconds of a clock that the test advances."""
    now, slept = [10.0], []
    monkeypatch.setattr(inject.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(inject.time, "sleep", slept.append)
    faults = parse(text, 1)
    for _ in range(2):
        with faults.span(3, "micro_batch", {}) or nullcontext():
            now[0] += 2.0
    assert slept == ([] if pause is None else [pytest.approx(pause)] * 2)


def test_an_error_inside_is_no_reason_to_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inject.time, "sleep", lambda seconds: pytest.fail("slept"))
    span = parse("delay:0:1,seconds=1").span(1, "micro_batch", {})
    assert span is not None
    with pytest.raises(KeyError), span:
        raise KeyError


def test_it_strikes_once_where_it_was_told_to(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    at, struck = (0, ""), []
    monkeypatch.setitem(inject.ACTIONS, "kill", lambda: struck.append(at))
    words = ["kill:2:3", "kill:2:4:apply", "kill:2:4:checkpoint"]
    faults = parse(f"{' '.join(words)} kill:1:2", 2)
    for at in [(step, phase) for step in (1, 2, 3, 2, 3, 4, 5) for phase in PHASES]:
        faults.enter(*at)
    assert struck == [(3, "compute"), (4, "apply"), (4, "checkpoint")]
    assert capsys.readouterr().err.splitlines() == [f"{VARIABLE}: rank 2: {word}" for word in words]


ENDS: dict[str, tuple[int, str]] = {
    "kill": (-signal.SIGKILL, ""), "segv": (-signal.SIGSEGV, ""), "exit": (3, ""), "sysexit": (3, "left"), "term": (-15, ""),
    "usr1": (-signal.SIGUSR1, ""), "raise": (1, "RuntimeError: an injected fault (MPIDP_FAULT)"),
    "kill:0:1:reduce,after=0.05": (-signal.SIGKILL, ""), "exit:0:1:reduce,after=0.05": (3, ""),
}
CHILD = """
import sys, time
from mpidp.faults.inject import parse
faults = parse(sys.argv[1])
try:
    for phase in ("data", "compute", "reduce"):
        faults.enter(1, phase)
    time.sleep(60)
finally:
    print("left", file=sys.stderr)
"""


@pytest.mark.parametrize("text", ENDS)
def test_what_it_does_to_the_process(text: str) -> None:
    code, said = ENDS[text]
    word = text if ":" in text else f"{text}:0:1"
    child = subprocess.run([sys.executable, "-c", CHILD, word], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    assert child.returncode == code and f"{VARIABLE}: rank 0: {word}" in child.stderr and said in child.stderr, child


@pytest.mark.parametrize("text", ["stop", "hang", "gil", "gil:0:1:reduce,after=0.05"])
def test_what_never_ends(text: str) -> None:
    word = text if ":" in text else f"{text}:0:1"
    child = subprocess.Popen([sys.executable, "-c", CHILD, word], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None and word in child.stderr.readline()
        if text == "stop":
            assert os.waitid(os.P_PID, child.pid, os.WSTOPPED) is not None
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dely:1:1,seconds=1", "'dely' is not one of kill, segv, stop, term, usr1, exit, gil, sysexit, raise, hang, delay"),
        ("kill", "kill must be written as kill:rank:step[:phase]"),
        ("kill:1", "kill must be written as kill:rank:step[:phase]"),
        ("kill:1:2:data:3", "kill must be written as kill:rank:step[:phase]"),
        ("kill:1:2:lunch", "phase 'lunch' is not one of data, compute, comm_wait, update, reduce"),
        ("kill:-1:2", "rank -1 must be 0 or more"),
        ("kill:1.5:2", "rank '1.5' is not an integer"),
        ("kill:1:0", "step 0 must be 1 or more"),
        ("kill:1:x", "step 'x' is not an integer"),
        ("kill:1:1,after=-1", "after=-1.0 must be 0 or more"),
        ("kill:1:1,after=inf", "after=inf must"),
        ("kill:1:1,seconds=1", "kill has no option 'seconds', only after"),
        ("raise:1:1,after=1", "raise has no option 'after', only a phase"),
        ("delay:1:1:compute,seconds=1", "delay must be written as delay:rank:step."),
        ("delay:1:1", "seconds= above 0 or factor= above 1"),
        ("delay:1:1,seconds=-1", "seconds=-1.0 must be 0 or more"),
        ("delay:1:1,seconds=nan", "seconds=nan must"),
        ("delay:1:1,factor=0.5", "factor=0.5 must be 1 or more"),
        ("delay:1:1,seconds=fast", "seconds 'fast' is not a number"),
        ("delay:1:1,seconds=1,seconds=1", "seconds is given twice"),
        ("delay:1:3,until=2,seconds=1", "until=2 is before step 3"),
        ("flip:1:5", "flip needs tensor=N, with N of 0 or more"),
        ("flip:1:5,tensor=1,bit=32", "flip needs bit=N, with N from 0 to 31"),
        ("flip:1:5,tensor=-1,bit=3", "flip needs tensor=N, with N of 0 or more"),
        ("nan:1:1,times=0", "times=0 must be 1 or more"),
        ("wrong:1:7,until=6", "until=6 is before step 7"),
        ("wrong:1:7, until=9", "wrong has no option '', only until"),
        ("wrong:1:7,until", "until '' is not an integer"),
    ],
)
def test_what_cannot_be_read_is_said_with_how_to_write_it(text: str, said: str) -> None:
    with pytest.raises(UsageError) as found:
        parse("wrong:0:1 " + text)
    assert said in str(found.value) and EXAMPLE in str(found.value) and str(found.value).startswith(VARIABLE)


@pytest.mark.parametrize("kind", ["wrong", "flip", "nan"])
def test_faults_that_no_audit_can_find_are_rejected_with_the_reason(kind: str) -> None:
    text = f"{kind}:0:1" + ",tensor=1,bit=3" * (kind == "flip")
    parse(text).check(keeps_lanes=True)
    said = f"'{text}' is not possible with x=1: y, so no audit can find the fault"
    with nullcontext() if kind == "nan" else pytest.raises(UsageError, match=said):
        parse(text).check(keeps_lanes=True, unaudited="x=1: y")
    said = f"'{text}' is not possible with train.audit_every, because this job has only one copy of the parameters"
    with pytest.raises(UsageError, match=said) if kind == "flip" else nullcontext():
        parse(text).check(keeps_lanes=True, compares=False)

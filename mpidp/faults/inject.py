"""Fault injection for tests and benchmarks. The environment variable MPIDP_FAULT defines which faults occur, where and when.

    MPIDP_FAULT="kill:1:5:reduce,after=0.01 delay:2:1,factor=2"

Faults are separated by spaces. The form of a fault is `kind:rank:step[:phase][,name=value...]`. `rank`: the rank's number when
the job started. `step`: the number of the step that is being computed, counted from 1. In the phases evaluate, checkpoint and
respawn, `step` is the last completed step. Without times= and until=, all kinds except delay occur once per process, even if
the run returns to a checkpoint or continues without failed ranks. This module imports neither torch nor MPI.

| kind | what happens |
|---|---|
| kill, segv, stop, term, usr1 | the rank sends itself this signal |
| exit, sysexit, raise | the rank calls os._exit(3), calls sys.exit(3), or raises a RuntimeError |
| hang, gil | the rank sleeps forever; with gil it also holds the GIL, so that no other thread runs |
| delay | after a micro-batch of t s, the rank sleeps seconds= + (factor= - 1) x t s, up to step until= (default: no limit) |
| nan | the gradient of one batch is not finite; with times=, the gradients of this many successive batches |
| wrong | the gradient is wrong once, and correct when the step is repeated; with until=, it is wrong each time, up to that step |
| flip | after the update, one bit flips in the first element of the parameter with index tensor=; bit= is 0 to 31 |

The kinds nan and wrong need comm.reducer=tree, which keeps the gradients of lanes (sequences of micro-batches) separate.
During training, only audits find the faults wrong and flip. The kinds wrong and flip are rejected with settings that audits do
not support (docs/methods.md). Faults of the first three rows occur when the phase begins. The default phase is compute. With
`after=SECONDS`, they occur this many seconds later, even if another phase has begun. The kinds sysexit, raise and hang do not
support `after`. A step has the phases data, compute, comm_wait and update. An update has the phases reduce, apply and publish.
After the update, the phases evaluate and checkpoint may follow. In the phase respawn, failed ranks are replaced.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from mpidp.errors import UsageError
from mpidp.runtime.log import log
from mpidp.runtime.observers import StepObserver

VARIABLE = "MPIDP_FAULT"
EXAMPLE = f'{VARIABLE}="kill:1:5:reduce,after=0.01 delay:2:1,factor=2 flip:0:5,tensor=3,bit=20"'
PHASES = ("data", "compute", "comm_wait", "update", "reduce", "apply", "publish", "evaluate", "checkpoint", "respawn")


def _signal(number: int) -> None:
    os.kill(os.getpid(), number)


def _hang() -> NoReturn:
    while True:
        time.sleep(3600)


def _hold_the_gil() -> NoReturn:
    while True:
        ctypes.PyDLL(None).sleep(3600)


def _raise() -> NoReturn:
    raise RuntimeError(f"an injected fault ({VARIABLE})")


def make_nan(lane: int, gradient: Any) -> None:
    """Set the first element of `gradient`, the gradient of lane number `lane` (a sequence of micro-batches), to NaN."""
    gradient[0] = math.nan


def make_wrong(lane: int, gradient: Any) -> None:
    """Add 1 to the first element of `gradient`, the gradient of lane number `lane` (a sequence of micro-batches)."""
    gradient[0] += 1.0


ANYWHERE: dict[str, Callable[[], None]] = {  # faults of the whole process, which a timer thread can cause
    "kill": partial(_signal, signal.SIGKILL), "segv": partial(_signal, signal.SIGSEGV), "stop": partial(_signal, signal.SIGSTOP),
    "term": partial(_signal, signal.SIGTERM), "usr1": partial(_signal, signal.SIGUSR1), "exit": partial(os._exit, 3),
    "gil": _hold_the_gil,
}
ACTIONS = ANYWHERE | {"sysexit": partial(sys.exit, 3), "raise": _raise, "hang": _hang}
OPTIONS = dict.fromkeys(ACTIONS, ("phase",)) | dict.fromkeys(ANYWHERE, ("phase", "after")) | {
    "delay": ("seconds", "factor", "until"), "nan": ("times",), "wrong": ("until",), "flip": ("tensor", "bit"),
}
WHOLE = ("rank", "step", "until", "times", "tensor", "bit")  # integer options; the others are floats


@dataclass(frozen=True)
class Fault:
    """One fault to inject. Raises ValueError if an option is not valid."""

    kind: str
    rank: int  # number of the rank when the job started
    step: int  # counted from 1
    phase: str = "compute"
    after: float = 0.0  # seconds after the phase begins
    seconds: float = 0.0  # constant part of a delay, in seconds
    factor: float = 1.0  # slowdown of each micro-batch by a delay
    until: int = 0  # last step of the fault; 0 means no limit for delay, and only one step for wrong
    times: int = 1  # number of batches
    tensor: int = -1  # index of the parameter
    bit: int = -1
    word: str = field(default="", compare=False)  # the fault as written in MPIDP_FAULT

    def __post_init__(self) -> None:
        _require(self.rank >= 0, f"rank {self.rank} must be 0 or more")
        _require(self.step >= 1, f"step {self.step} must be 1 or more")
        _require(self.phase in PHASES, f"phase {self.phase!r} is not one of {', '.join(PHASES)}")
        for name, low in (("after", 0), ("seconds", 0), ("factor", 1), ("times", 1)):
            _require(low <= getattr(self, name) < math.inf, f"{name}={getattr(self, name)} must be {low} or more")
        _require(self.until in (0, max(self.until, self.step)), f"until={self.until} is before step {self.step}")
        _require(self.kind != "delay" or self.seconds > 0 or self.factor > 1, "delay needs seconds= above 0 or factor= above 1")
        _require(self.kind != "flip" or self.tensor >= 0, "flip needs tensor=N, with N of 0 or more")
        _require(self.kind != "flip" or 0 <= self.bit <= 31, "flip needs bit=N, with N from 0 to 31")


class InjectedFaults(StepObserver):
    """The injected faults of a job, and a count of those that have occurred on this rank. The truth value of the object is
    False if there are no faults. Independent."""

    def __init__(self, faults: Sequence[Fault] = (), rank: int = 0) -> None:
        self.of_all_ranks = tuple(faults)
        self.rank, self.of_this_rank = rank, [fault for fault in faults if fault.rank == rank]
        self._happened: Counter[Fault] = Counter()

    def __bool__(self) -> bool:
        return bool(self.of_all_ranks)

    @property
    def changes_gradients(self) -> bool:
        """Whether a fault on any rank changes gradients of single lanes (sequences of micro-batches). If so, the reducer must
        keep the gradients of lanes separate."""
        return any(fault.kind in ("nan", "wrong") for fault in self.of_all_ranks)

    def check(self, keeps_lanes: bool, unaudited: str = "") -> None:
        """Raise UsageError if a fault on any rank is not possible in this job. `keeps_lanes`: whether the job keeps the
        gradients of single lanes or micro-batches, so that a fault can change these gradients. `unaudited`: a setting of the
        job that audits do not support, with the reason, or "" if there is no such setting."""
        for fault in self.of_all_ranks:
            if unaudited and fault.kind in ("wrong", "flip"):
                raise UsageError.on_every_rank(
                    f"{VARIABLE}: {fault.word!r} is not possible with {unaudited}, so no audit can find the fault. Choose "
                    f"another value of this setting, or remove the fault from {VARIABLE}"
                )
            if fault.kind in ("wrong", "nan") and not keeps_lanes:
                raise UsageError.on_every_rank(
                    f"{VARIABLE}: {fault.word!r} changes the gradient of one lane (a sequence of micro-batches), but only "
                    "comm.reducer=tree keeps the gradients of lanes separate. Use comm.reducer=tree with "
                    "strategy.name=synchronous and comm.compress=none"
                )

    def enter(self, step: int, phase: str) -> None:
        """Cause this rank's faults for this phase of this step, except the kinds delay, nan, wrong and flip. Faults with
        after=SECONDS occur later."""
        place = (step, phase)
        for fault in self.of_this_rank:
            if fault.kind in ACTIONS and (fault.step, fault.phase) == place and self._once(fault):
                if fault.after:
                    timer = threading.Timer(fault.after, ACTIONS[fault.kind])
                    timer.daemon = True
                    timer.start()
                else:
                    ACTIONS[fault.kind]()

    def gradient_faults(self, step: int, attempt: int = 0) -> list[Callable[[int, Any], None]]:
        """Return functions that change gradients in this step. For every lane (sequence of micro-batches), call each function
        with the arguments (number of the lane, its gradient). `attempt`: 0 when the step is first computed, and more when it
        is repeated. The kind nan, and the kind wrong without until=, occur only in attempt 0. The kind wrong with until=
        occurs in every attempt."""
        return [
            make_nan if fault.kind == "nan" else make_wrong for fault in self.of_this_rank
            if (fault.kind == "wrong" and fault.until > fault.step and fault.step <= step <= fault.until)
            or (fault.kind == "wrong" and fault.until <= fault.step == step and attempt == 0 and self._once(fault))
            or (fault.kind == "nan" and fault.step <= step and attempt == 0 and self._once(fault))
        ]

    def flip(self, step: int, parameters: Sequence[Any]) -> None:
        """Cause this rank's faults of the kind flip for this step. Call this method after the update of the step.
        `parameters`: all parameters, in order."""
        for fault in self.of_this_rank:
            if fault.kind == "flip" and fault.step == step and self._once(fault):
                first = parameters[fault.tensor].detach().view(-1)[:1]
                host = first.cpu()
                host.numpy().view("uint32")[0] ^= 1 << fault.bit
                first.copy_(host)

    def span(self, step: int, name: str, about: dict[str, Any]) -> AbstractContextManager[None] | None:
        """Return a context for the computation of a micro-batch. At its end, the context sleeps for the injected delay. Return
        None if no delay is injected in this step, or if `name` is not "micro_batch"."""
        delays = [f for f in self.of_this_rank if f.kind == "delay" and f.step <= step <= (f.until or step)]
        return self._slowed(delays) if delays and name == "micro_batch" else None

    @contextmanager
    def _slowed(self, delays: Sequence[Fault]) -> Iterator[None]:
        began = time.perf_counter()
        yield
        took = time.perf_counter() - began
        pause = sum(fault.seconds + (fault.factor - 1) * took for fault in delays)
        if pause:
            time.sleep(pause)

    def _once(self, fault: Fault) -> bool:
        """Return False if the fault has already occurred `times` times. Otherwise count and print the fault, and return True."""
        if self._happened[fault] >= fault.times:
            return False
        self._happened[fault] += 1
        log.warning("%s: rank %d: %s", VARIABLE, self.rank, fault.word)
        return True


def parse(text: str, rank: int = 0) -> InjectedFaults:
    """Return the faults in `text`, which has the form of MPIDP_FAULT. `rank`: this rank. Raises UsageError if the text is not
    valid. Independent."""
    return InjectedFaults([_fault(word) for word in text.split()], rank)


def faults_from_environment(rank: int, environment: Mapping[str, str] = os.environ, size: float = math.inf) -> InjectedFaults:
    """Return the faults in the variable MPIDP_FAULT. If it is not set, there are no faults. Rank 0 prints a warning if there
    are faults. `size`: the largest number of ranks that the job can have. Raises UsageError if the variable is not valid, or
    names a rank that the job cannot have. Independent."""
    text = environment.get(VARIABLE, "").strip()
    faults = parse(text, rank)
    for fault in faults.of_all_ranks:
        if fault.rank >= size:
            raise UsageError(f"{VARIABLE}={fault.word!r}: the job has no rank {fault.rank}, only ranks 0 to {size - 1}")
    if faults and rank == 0:
        log.warning("%s is set: THIS RUN HAS INJECTED FAULTS: %s", VARIABLE, text)
    return faults


def _fault(word: str) -> Fault:
    try:
        where, *pairs = word.split(",")
        kind, *places = where.split(":")
        _require(kind in OPTIONS, f"{kind!r} is not one of {', '.join(OPTIONS)}")
        _require(2 <= len(places) <= 2 + ("phase" in OPTIONS[kind]), f"{kind} must be written as {kind}:rank:step"
              + "[:phase]" * ("phase" in OPTIONS[kind]))
        values: dict[str, Any] = {"rank": _number("rank", places[0]), "step": _number("step", places[1])}
        values |= dict(zip(["phase"], places[2:], strict=False))
        names = [name for name in OPTIONS[kind] if name != "phase"]
        for pair in pairs:
            name, _, value = pair.partition("=")
            _require(name in names, f"{kind} has no option {name!r}, only {', '.join(names) or 'a phase'}")
            _require(name not in values, f"{name} is given twice")
            values[name] = _number(name, value)
        return Fault(kind, word=word, **values)
    except ValueError as error:
        raise UsageError(f"{VARIABLE}={word!r}: {error}. Write it like {EXAMPLE}") from None


def _number(name: str, text: str) -> float:
    try:
        return int(text) if name in WHOLE else float(text)
    except ValueError:
        raise ValueError(f"{name} {text!r} is not {'an integer' if name in WHOLE else 'a number'}") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)

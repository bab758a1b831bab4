"""Faults on purpose, for tests and benchmarks: the environment variable MPIDP_FAULT says which, where and when.

    MPIDP_FAULT="kill:1:5:reduce,after=0.01 delay:2:1,factor=2"

Words are separated by spaces: `kind:rank:step[:phase][,name=value...]`. rank: its number when the job started. step: the one
being computed, counted from 1; in the phases evaluate, checkpoint and respawn the one that was made last. Each happens once in a
process, also where the run goes back or goes on without a dead rank. Nothing here imports torch or MPI.

| kind | what happens |
|---|---|
| kill, segv, stop, term, usr1 | the rank sends itself this signal |
| exit, sysexit, raise | os._exit(3), sys.exit(3), a RuntimeError |
| hang, gil | it sleeps for ever; gil: and lets no other thread run |
| delay | in steps from this one (until=): it sleeps after each micro-batch: seconds=, and (factor= - 1) times what that took |
| nan | the gradient of one batch is not finite; times=: of so many batches in a row |
| wrong | the gradient is wrong: once, a glitch that is gone when the step is done again; until=: in all those steps |
| flip | after the update, a bit of the first number of a parameter is flipped: tensor= (which, in order), bit= (0..31) |

nan and wrong need comm.reducer=tree, which keeps lanes apart. Those of the first three lines strike when the phase begins
(default: compute), or `after=SECONDS` later, whatever the rank does by then. Phases of a step: data, compute, comm_wait, update,
and in that reduce, apply, publish; after it evaluate, checkpoint; where dead ranks are replaced, respawn.
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
    raise RuntimeError(f"a fault on purpose ({VARIABLE})")


def make_nan(lane: int, gradient: Any) -> None:
    """The lane's gradient is not finite."""
    gradient[0] = math.nan


def make_wrong(lane: int, gradient: Any) -> None:
    """A core that adds wrongly, at one place."""
    gradient[0] += 1.0


ANYWHERE: dict[str, Callable[[], None]] = {  # a timer's thread can do these to the whole process
    "kill": partial(_signal, signal.SIGKILL), "segv": partial(_signal, signal.SIGSEGV), "stop": partial(_signal, signal.SIGSTOP),
    "term": partial(_signal, signal.SIGTERM), "usr1": partial(_signal, signal.SIGUSR1), "exit": partial(os._exit, 3),
    "gil": _hold_the_gil,
}
ACTIONS = ANYWHERE | {"sysexit": partial(sys.exit, 3), "raise": _raise, "hang": _hang}
OPTIONS = dict.fromkeys(ACTIONS, ("phase",)) | dict.fromkeys(ANYWHERE, ("phase", "after")) | {
    "delay": ("seconds", "factor", "until"), "nan": ("times",), "wrong": ("until",), "flip": ("tensor", "bit"),
}
WHOLE = ("rank", "step", "until", "times", "tensor", "bit")  # numbers; the others may have a fraction


@dataclass(frozen=True)
class Fault:
    """One word, read. ValueError for what cannot be."""

    kind: str
    rank: int
    step: int
    phase: str = "compute"
    after: float = 0.0
    seconds: float = 0.0
    factor: float = 1.0
    until: int = 0  # 0: delay: for ever; wrong: this step
    times: int = 1
    tensor: int = -1
    bit: int = -1
    word: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _need(self.rank >= 0, f"rank {self.rank} must be 0 or more")
        _need(self.step >= 1, f"step {self.step} must be 1 or more")
        _need(self.phase in PHASES, f"phase {self.phase!r} is none of {', '.join(PHASES)}")
        for name, low in (("after", 0), ("seconds", 0), ("factor", 1), ("times", 1)):
            _need(low <= getattr(self, name) < math.inf, f"{name}={getattr(self, name)} must be {low} or more")
        _need(self.until in (0, max(self.until, self.step)), f"until={self.until} is before step {self.step}")
        _need(self.kind != "delay" or self.seconds > 0 or self.factor > 1, "it needs seconds= above 0 or factor= above 1")
        _need(self.kind != "flip" or self.tensor >= 0, "it needs tensor=, 0 or more")
        _need(self.kind != "flip" or 0 <= self.bit <= 31, "it needs bit=, in 0..31")


class InjectedFaults(StepObserver):
    """What goes wrong on this rank, and what of it has happened. False when nothing does on any rank. Independent."""

    def __init__(self, faults: Sequence[Fault] = (), rank: int = 0) -> None:
        self.of_all_ranks = tuple(faults)
        self.rank, self.of_this_rank = rank, [fault for fault in faults if fault.rank == rank]
        self._happened: Counter[Fault] = Counter()

    def __bool__(self) -> bool:
        return bool(self.of_all_ranks)

    @property
    def changes_gradients(self) -> bool:
        """Are gradients of single lanes to be spoilt, on any rank? Then lanes must be kept apart."""
        return any(fault.kind in ("nan", "wrong") for fault in self.of_all_ranks)

    def enter(self, step: int, phase: str) -> None:
        """This rank enters a phase of a step: what is to end or stop it there does so, now or from a timer."""
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
        """What is to be done to each lane's gradient in this step. A glitch happens at the first attempt alone: it is gone when
        the step is done again; what lasts several steps happens always: a core that has failed."""
        return [
            make_nan if fault.kind == "nan" else make_wrong for fault in self.of_this_rank
            if (fault.kind == "wrong" and fault.until > fault.step and fault.step <= step <= fault.until)
            or (fault.kind == "wrong" and fault.until <= fault.step == step and attempt == 0 and self._once(fault))
            or (fault.kind == "nan" and fault.step <= step and attempt == 0 and self._once(fault))
        ]

    def flip(self, step: int, parameters: Sequence[Any]) -> None:
        """After the update of a step: the bits of parameters that are to be flipped."""
        for fault in self.of_this_rank:
            if fault.kind == "flip" and fault.step == step and self._once(fault):
                first = parameters[fault.tensor].detach().view(-1)[:1]
                host = first.cpu()
                host.numpy().view("uint32")[0] ^= 1 << fault.bit
                first.copy_(host)

    def span(self, step: int, name: str, about: dict[str, Any]) -> AbstractContextManager[None] | None:
        """A micro-batch is computed inside; its delays follow it."""
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
        """Is there a time left for it to happen? Then it does, and says so."""
        if self._happened[fault] >= fault.times:
            return False
        self._happened[fault] += 1
        print(f"{VARIABLE}: rank {self.rank}: {fault.word}", file=sys.stderr, flush=True)
        return True


def parse(text: str, rank: int = 0) -> InjectedFaults:
    """The faults that a text asks for, as seen by this rank; UsageError when it cannot be read. Independent."""
    return InjectedFaults([_fault(word) for word in text.split()], rank)


def faults_from_environment(rank: int, environment: Mapping[str, str] = os.environ) -> InjectedFaults:
    """The faults of MPIDP_FAULT, of which rank 0 speaks; none when it is not set. UsageError. Independent."""
    text = environment.get(VARIABLE, "").strip()
    faults = parse(text, rank)
    if faults and rank == 0:
        print(f"{VARIABLE} is set: THIS RUN HAS FAULTS ON PURPOSE: {text}", file=sys.stderr, flush=True)
    return faults


def _fault(word: str) -> Fault:
    try:
        where, *pairs = word.split(",")
        kind, *places = where.split(":")
        _need(kind in OPTIONS, f"{kind!r} is none of {', '.join(OPTIONS)}")
        _need(2 <= len(places) <= 2 + ("phase" in OPTIONS[kind]), f"{kind} is written {kind}:rank:step"
              + "[:phase]" * ("phase" in OPTIONS[kind]))
        values: dict[str, Any] = {"rank": _number("rank", places[0]), "step": _number("step", places[1])}
        values |= dict(zip(["phase"], places[2:], strict=False))
        names = [name for name in OPTIONS[kind] if name != "phase"]
        for pair in pairs:
            name, _, value = pair.partition("=")
            _need(name in names, f"{kind} takes {', '.join(names) or 'no more'}, not {name!r}")
            _need(name not in values, f"{name} is said twice")
            values[name] = _number(name, value)
        return Fault(kind, word=word, **values)
    except ValueError as error:
        raise UsageError(f"{VARIABLE}: {word!r}: {error}; write it like {EXAMPLE}") from None


def _number(name: str, text: str) -> float:
    try:
        return int(text) if name in WHOLE else float(text)
    except ValueError:
        raise ValueError(f"{name} {text!r} is not a {'whole ' * (name in WHOLE)}number") from None


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)

"""Faults on purpose, for tests and benchmarks: the environment variable MPIDP_INJECT says which, where and when.

    MPIDP_INJECT="delay:rank=1,seconds=0.02 flip:rank=2,step=5,tensor=3,bit=20 wrong:rank=1,step=7,until=9"

Words are separated by spaces; what each kind takes is what its class below has. Nothing here imports torch or MPI.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields

from mpidp.errors import UsageError

VARIABLE = "MPIDP_INJECT"
EXAMPLE = f'{VARIABLE}="delay:rank=1,seconds=0.02 flip:rank=2,step=5,tensor=3,bit=20 wrong:rank=1,step=7,until=9"'
TYPES = {"int": (int, "a whole number"), "float": (float, "a number")}


@dataclass(frozen=True)
class Delay:
    """The rank sleeps in every micro-batch: `seconds`, and (factor - 1) times as long as the micro-batch took."""

    rank: int
    seconds: float = 0.0
    factor: float = 1.0  # as if the rank were that many times slower

    def __post_init__(self) -> None:
        _need(0 <= self.seconds < math.inf, f"seconds={self.seconds} must be 0 or more")
        _need(1 <= self.factor < math.inf, f"factor={self.factor} must be 1 or more")
        _need(self.seconds > 0 or self.factor > 1, "it needs seconds= above 0 or factor= above 1")


@dataclass(frozen=True)
class Flip:
    """The rank flips a bit of one of its weights after the update of a step."""

    rank: int
    step: int
    tensor: int  # which parameter, in order
    bit: int  # of its first float32, 0 (mantissa) to 31 (sign)

    def __post_init__(self) -> None:
        _need(self.step >= 1, f"step={self.step} must be 1 or more")
        _need(self.tensor >= 0, f"tensor={self.tensor} must be 0 or more")
        _need(0 <= self.bit <= 31, f"bit={self.bit} must be in 0..31")


@dataclass(frozen=True)
class Wrong:
    """The rank computes a wrong gradient in the steps step..until."""

    rank: int
    step: int
    until: int = 0  # 0: step

    def __post_init__(self) -> None:
        if self.until == 0:
            object.__setattr__(self, "until", self.step)
        _need(1 <= self.step <= self.until, f"step={self.step} must be 1 or more, and until={self.until} not below it")


KINDS: dict[str, type[Delay] | type[Flip] | type[Wrong]] = {"delay": Delay, "flip": Flip, "wrong": Wrong}


@dataclass(frozen=True)
class Faults:
    """What goes wrong, on all ranks or on one. False when nothing does. Independent."""

    faults: tuple[Delay | Flip | Wrong, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.faults)

    def of_rank(self, rank: int) -> Faults:
        """Those of one rank."""
        return Faults(tuple(fault for fault in self.faults if fault.rank == rank))

    def flips(self, step: int) -> list[Flip]:
        """After the update of this step."""
        return [fault for fault in self.faults if isinstance(fault, Flip) and fault.step == step]

    def wrong(self, step: int, attempt: int = 0) -> bool:
        """Is the gradient of this step to be wrong? Of a single step only at the first attempt: a glitch, which is gone when the
        step is done again; of several steps, always: a core that has failed."""
        return any(
            isinstance(fault, Wrong) and fault.step <= step <= fault.until and (attempt == 0 or fault.until > fault.step)
            for fault in self.faults
        )

    @contextmanager
    def slowed(self) -> Iterator[None]:
        """A micro-batch is computed inside; the delays follow it."""
        began = time.perf_counter()
        yield
        took = time.perf_counter() - began
        pause = sum(d.seconds + (d.factor - 1) * took for d in self.faults if isinstance(d, Delay))
        if pause:
            time.sleep(pause)


def parse(text: str) -> Faults:
    """The faults that a text asks for; UsageError when it cannot be read. Independent."""
    return Faults(tuple(_fault(word) for word in text.split()))


def asked_for(environment: Mapping[str, str] = os.environ) -> Faults:
    """The faults of MPIDP_INJECT; none when it is not set. UsageError. Independent."""
    return parse(environment.get(VARIABLE, ""))


def _fault(word: str) -> Delay | Flip | Wrong:
    kind, _, rest = word.partition(":")
    try:
        _need(kind in KINDS, f"{kind!r} is none of {', '.join(KINDS)}")
        known = {field.name: field for field in fields(KINDS[kind])}
        values: dict[str, int | float] = {}
        for pair in rest.split(",") if rest else ():
            name, _, value = pair.partition("=")
            _need(name in known, f"{kind} takes {', '.join(known)}, not {name!r}")
            _need(name not in values, f"{name} is said twice")
            of_type, called = TYPES[str(known[name].type)]
            try:
                values[name] = of_type(value)
            except ValueError:
                raise ValueError(f"{name}={value} is not {called}") from None
        missing = [name for name, field in known.items() if field.default is MISSING and name not in values]
        _need(not missing, f"{kind} needs {', '.join(missing)}")
        _need(values["rank"] >= 0, f"rank={values['rank']} must be 0 or more")
        return KINDS[kind](**values)  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(f"{VARIABLE}: {word!r}: {error}; write it like {EXAMPLE}") from None


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)

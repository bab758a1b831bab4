"""Measures the seconds spent in each phase of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpidp.runtime.observers import NO_OBSERVERS, StepObservers


class Clock:
    """Measures the seconds spent in named phases since the last pop_seconds(). Phases may be nested. The time of an inner
    phase then also counts for the outer phase. Independent."""

    def __init__(self, observers: StepObservers = NO_OBSERVERS) -> None:
        """observers: objects that are notified when a phase begins and ends."""
        self._observers = observers
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, phase: str) -> Iterator[Callable[[], float]]:
        """Return a context manager that measures the phase with the name `phase`. It yields a function that returns the
        seconds since the phase began."""
        begin = time.perf_counter()
        with self._observers.span(phase):
            yield lambda: time.perf_counter() - begin
        self._seconds[phase] += time.perf_counter() - begin

    def so_far(self, phase: str) -> float:
        """Return the seconds spent in the phase `phase` since the last pop_seconds(). A phase counts only after it has
        ended."""
        return self._seconds[phase]

    def pop_seconds(self) -> dict[str, float]:
        """Return {"<phase>_seconds": seconds}, and set all phases to 0."""
        taken = {f"{phase}_seconds": seconds for phase, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken

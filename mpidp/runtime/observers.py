"""Observers of a step: the watchdog, injected faults and the timeline look at a step from inside through one interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

AFTER_UPDATE = ("evaluate", "evaluate_wait", "checkpoint", "checkpoint_wait", "respawn")  # phases that follow a step


class StepObserver:
    """One observer. Every method does nothing here; a subclass overrides those that it needs. Independent."""

    def enter(self, step: int, phase: str) -> None:
        """The rank enters a phase of this step (counted from 1)."""

    def progressed(self) -> None:
        """The rank has finished a micro-batch."""

    def reducing(self, bucket: int) -> None:
        """The rank begins to reduce this bucket. May be called from another thread."""

    def summed(self, total: Any) -> None:
        """total, (num_elements,), holds the sum of the gradients over all lanes, not yet scaled."""

    def span(self, step: int, name: str, about: dict[str, Any]) -> AbstractContextManager[Any] | None:
        """A context around a piece of work, or None."""
        return None


class StepObservers:
    """Several observers as one. The engine, the reducer and the strategy hold it and report to it. Independent."""

    def __init__(self, observers: Sequence[StepObserver] = (), steps_made: Callable[[], int] = lambda: 0) -> None:
        """steps_made: the number of updates made so far."""
        self._observers, self._steps_made = list(observers), steps_made

    def enter(self, phase: str) -> None:
        """The rank enters a phase of the current step; the phases of AFTER_UPDATE belong to the step that was made last."""
        step = self._step(phase)
        for observer in self._observers:
            observer.enter(step, phase)

    def progressed(self) -> None:
        """See StepObserver."""
        for observer in self._observers:
            observer.progressed()

    def reducing(self, bucket: int) -> None:
        """See StepObserver."""
        for observer in self._observers:
            observer.reducing(bucket)

    def summed(self, total: Any) -> None:
        """See StepObserver."""
        for observer in self._observers:
            observer.summed(total)

    def span(self, name: str, **about: Any) -> AbstractContextManager[Any]:
        """A context around a piece of work: of a phase, a micro-batch, a forward, a backward, a reduction, a bucket."""
        spans = [span for one in self._observers if (span := one.span(self._step(name), name, about)) is not None]
        return _all(spans) if spans else nullcontext()

    def _step(self, phase: str) -> int:
        return self._steps_made() + (phase not in AFTER_UPDATE)


@contextmanager
def _all(spans: list[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for span in spans:
            stack.enter_context(span)
        yield


NO_OBSERVERS = StepObservers()

"""Observers of a step: objects that are notified of the step's progress. The watchdog, injected faults and the timeline are
observers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

AFTER_UPDATE = ("evaluate", "evaluate_wait", "checkpoint", "checkpoint_wait", "respawn")  # phases that follow a step


class StepObserver:
    """The base class of observers. Its methods do nothing, so a subclass overrides only the methods that it needs.
    Independent."""

    def enter(self, step: int, phase: str) -> None:
        """Called when the rank enters a phase of step `step`. Steps are counted from 1."""

    def progressed(self) -> None:
        """Called when the rank has finished a micro-batch."""

    def reducing(self, bucket: int) -> None:
        """Called when the rank begins to reduce bucket number `bucket`. The caller may be another thread."""

    def summed(self, total: Any) -> None:
        """Called before the sum of all gradients is scaled. `total`: this sum, of shape (num_elements,)."""

    def span(self, step: int, name: str, about: dict[str, Any]) -> AbstractContextManager[Any] | None:
        """Return None, or a context manager inside which the rank does some work. `name`: the type of work. `about`: details
        of the work."""
        return None


class StepObservers:
    """Passes every notification to several observers. Independent."""

    def __init__(self, observers: Sequence[StepObserver] = (), steps_made: Callable[[], int] = lambda: 0) -> None:
        """`observers`: the observers. `steps_made`: a function that returns the number of updates so far."""
        self._observers, self._steps_made = list(observers), steps_made

    def enter(self, phase: str) -> None:
        """Report that the rank enters a phase of the current step. A phase in AFTER_UPDATE belongs to the last completed step."""
        step = self._step(phase)
        for observer in self._observers:
            observer.enter(step, phase)

    def progressed(self) -> None:
        """Report that the rank has finished a micro-batch."""
        for observer in self._observers:
            observer.progressed()

    def reducing(self, bucket: int) -> None:
        """Report that the rank begins to reduce bucket number `bucket`."""
        for observer in self._observers:
            observer.reducing(bucket)

    def summed(self, total: Any) -> None:
        """Report `total`, the sum of all gradients, before this sum is scaled."""
        for observer in self._observers:
            observer.summed(total)

    def span(self, name: str, **about: Any) -> AbstractContextManager[Any]:
        """Return a context manager, inside which the rank must do its work. `name`: the type of work, such as a phase, a
        micro-batch, a forward pass or a bucket. `about`: details of the work."""
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

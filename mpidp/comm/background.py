"""A thread that communicates while the rank computes: what is given to it is done in order, on every rank alike. Where MPI does
not allow two threads to call it, all is done at once instead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from mpi4py import MPI


class Task:
    """Something that is being done in the background."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._done = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """By the thread. Independent."""
        try:
            self._work()
        except BaseException as error:  # told by wait(): a thread's own traceback would be lost
            self._error = error
        self._done.set()

    def wait(self) -> None:
        """Until it is done; raises what it raised. Independent: that others do theirs too is the caller's business."""
        self._done.wait()
        if self._error is not None:
            raise self._error


class Background:
    """The thread, started when it is first needed. Independent; what it is given may be collective, in the same order on all."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], None]) -> Task:
        """Do this after what was submitted before."""
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            task = Task(work)
            task.run()
            return task
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mpidp-background", daemon=True)
            self._thread.start()
        task = Task(work)
        self._tasks.put(task)
        return task

    def close(self) -> None:
        """Once all is done. No more after it."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.run()

"""A thread that communicates while the rank computes. It runs tasks in the order in which they are submitted. If the MPI library
does not allow calls from two threads at a time, submit() runs each task immediately, in the calling thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from mpi4py import MPI


class Task:
    """A function that the background thread calls. The object also stores the exception if the function raises one."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._done = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Run the task. If it raises an exception, store this exception for wait(). The background thread calls this method.
        Independent."""
        try:
            self._work()
        except BaseException as error:  # wait() raises it in the calling thread; an error raised here would be lost
            self._error = error
        self._done.set()

    def wait(self) -> None:
        """Wait until the task is done. If the task raised an exception, raise it here. If the task is collective, the caller must
        ensure that the other ranks also submit it. Independent."""
        self._done.wait()
        if self._error is not None:
            raise self._error


class Background:
    """The background thread. It starts when the first task is submitted. Tasks may be collective if all ranks submit the same
    tasks in the same order. Independent."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], None]) -> Task:
        """Submit a task that calls work(), and return the task. The thread runs it after all earlier tasks."""
        task = Task(work)
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            task.run()
            return task
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mpidp-background", daemon=True)
            self._thread.start()
        self._tasks.put(task)
        return task

    def close(self) -> None:
        """Wait until all tasks are done, and stop the thread."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.run()

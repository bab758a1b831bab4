"""The Work objects that torch.distributed returns for running calls, and the futures of these objects."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from mpi4py import MPI
from torch.distributed import DistBackendError
from torch.distributed.distributed_c10d import Work

from mpidp.c10d.hosted import HostBuffer, device_of
from mpidp.c10d.waiting import LONGEST_SECONDS, YIELDS

FOREVER = timedelta(0)  # torch passes zero if no timeout is given


def tensors_in(result: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors of a nested list. Pure."""
    if isinstance(result, torch.Tensor):
        yield result
    else:
        for part in result:
            yield from tensors_in(part)


class Promise(Work):
    """A Work object. It completes once, with a result or with an error. Independent."""

    def __init__(self, result: Any, name: str) -> None:
        super().__init__()
        self.name = name
        self.error: BaseException | None = None
        self._result = result
        self.finished = threading.Event()
        self._lock = threading.Lock()
        self._trigger: Any = None
        self._future: Any = None
        self.record: Callable[[], None] | None = None  # a function that ends the call's record in the profiler

    def end(self, error: BaseException | None = None) -> None:
        """Complete the work, with `error` if it is given. Only the first call has an effect."""
        with self._lock:
            if self.finished.is_set():
                return
            self.error = error
            self.finished.set()
            trigger = self._trigger
        if self.record is not None:
            self.record()
        if trigger is not None:
            trigger.set_result(None)

    @property
    def ended(self) -> bool:
        return self.finished.is_set()

    def wait(self, timeout: timedelta = FOREVER) -> bool:
        """Wait until the work is complete, and return True. Raises the error of the call if the call failed. Raises
        DistBackendError if the work is not complete after `timeout`."""
        seconds = timeout.total_seconds() if timeout else 0.0
        if not self._wait(seconds if seconds > 0 else None):
            raise DistBackendError(f"mpi4py: Timed out after {seconds:g} s, waiting for {self.name}")
        if self.error is not None:
            raise self.error
        return True

    def _wait(self, seconds: float | None) -> bool:
        return self.finished.wait(seconds)

    def synchronize(self) -> None:
        """Wait until the work is complete, like wait()."""
        self.wait()

    def is_completed(self) -> bool:
        return self.ended

    def is_success(self) -> bool:
        return self.ended and self.error is None

    def exception(self) -> BaseException | None:
        return self.error

    def result(self) -> list[torch.Tensor]:
        return list(tensors_in(self._result))

    def get_future(self) -> Any:
        """Return a future of the result. If the call fails, the future gets the call's error, which C++ code also receives."""
        with self._lock:
            if self._future is not None:
                return self._future
            device = device_of(tensors_in(self._result))
            self._trigger = torch.futures.Future(devices=[device]) if device is not None else torch.futures.Future()
            self._future = self._trigger.then(self._value)
            ended = self.finished.is_set()
        if ended:
            self._trigger.set_result(None)
        return self._future

    def _value(self, _: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self._result


class Queued(Promise):
    """A collective in a group's queue (turns.py)."""

    def __init__(self, work: Callable[[], None], result: Any, name: str, seconds: float) -> None:
        """`work`: a function that runs the collective. `result`: the output tensors. `name`: the call's name in messages.
        `seconds`: the timeout."""
        super().__init__(result, name)
        self.seconds = seconds
        self.number = 0  # number of the collective in its group, counted from 1
        self.began = 0.0
        self.reported = False  # whether the store contains an entry that this rank waits in this call
        self._work: Callable[[], None] | None = work

    def run(self) -> None:
        """Run the collective and complete the work. turns.py calls this method."""
        work, self._work = self._work, None
        if self.ended or work is None:
            return
        self.began = time.monotonic()
        try:
            work()
        except MPI.Exception as error:
            wrapped = DistBackendError(f"mpi4py: {self.name}: {error}")
            wrapped.__cause__ = error
            self.end(wrapped)
        except BaseException as error:
            self.end(error)
        else:
            self.end()

    def drop(self, error: BaseException) -> None:
        """Complete the work with `error`, without running the collective."""
        self._work = None
        self.end(error)


class Message(Promise):
    """The Work object of a nonblocking send or receive."""

    def __init__(self, requests: list[MPI.Request], hosted: HostBuffer, receives: bool, name: str, seconds: float) -> None:
        super().__init__([hosted.tensor], name)
        self.seconds = seconds
        self._requests = requests
        self._hosted = hosted
        self._receives = receives
        self._source = -1
        self._began = time.monotonic()
        self._testing = threading.Lock()

    def progress(self) -> bool:
        """Complete the work if all its MPI requests are complete. Return whether the work is complete."""
        with self._testing:
            if self.ended:
                return True
            statuses = [MPI.Status() for _ in self._requests]
            try:
                if not MPI.Request.Testall(self._requests, statuses):
                    return False
                if self._receives:
                    self._arrive(statuses)
            except BaseException as error:
                self.end(error)
            else:
                self.end()
            return True

    def _arrive(self, statuses: list[MPI.Status]) -> None:
        self._source = statuses[0].Get_source()
        got, wanted = sum(status.Get_count(MPI.BYTE) for status in statuses), self._hosted.tensor.nbytes
        if got != wanted:
            raise DistBackendError(f"mpi4py: {self.name}: rank {self._source} sent {got} bytes for a tensor of {wanted} bytes")
        self._hosted.store()

    def _wait(self, seconds: float | None) -> bool:
        polls, pause = 0, 2e-5
        end = time.monotonic() + (self.seconds if seconds is None else seconds)
        while not self.progress():
            polls += 1
            if polls <= YIELDS:
                os.sched_yield()
                continue
            time.sleep(pause)
            pause = min(LONGEST_SECONDS, 1.5 * pause)
            if time.monotonic() > end:
                if seconds is not None:
                    return False
                raise DistBackendError(f"mpi4py: Timed out after {self.seconds:g} s in {self.name}")
        return True

    def close(self) -> bool:
        """Cancel the message if it is a receive without a matching send. Return whether the work is complete."""
        if not self.progress() and self._receives:
            with self._testing:
                for request in self._requests:
                    request.Cancel()
                    request.Wait()
                self.end(DistBackendError(f"mpi4py: {self.name}: the group was destroyed before a message arrived"))
        return self.ended

    def is_completed(self) -> bool:
        return self.progress()

    def get_future(self) -> Any:
        """Return a future of the result. A new thread polls the MPI requests until they complete."""
        future = super().get_future()
        if not self.progress():
            threading.Thread(target=self._poll, name="mpidp-c10d-message", daemon=True).start()
        return future

    def _poll(self) -> None:
        try:
            self._wait(None)
        except BaseException as error:
            self.end(error)

    def source_rank(self) -> int:
        """Return the rank of the sender in the group, or -1 if the message has not arrived."""
        return self._source

    _source_rank = source_rank


class Coalesced(Promise):
    """A Work object that stands for several calls. It completes when all of them are complete."""

    def __init__(self, works: list[Promise]) -> None:
        super().__init__([work.result() for work in works], " + ".join(work.name for work in works) or "nothing")
        self._works = works

    def _wait(self, seconds: float | None) -> bool:
        for work in self._works:
            work.wait(timedelta(seconds=seconds) if seconds else FOREVER)
        self.end()
        return True

    def is_completed(self) -> bool:
        if all(work.is_completed() for work in self._works):
            self.end(next((work.error for work in self._works if work.error), None))
        return self.ended

    def get_future(self) -> Any:
        """Return a future of the results. It completes when all calls are complete."""
        return torch.futures.collect_all([work.get_future() for work in self._works]).then(lambda _: self._result)

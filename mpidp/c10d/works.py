"""What torch.distributed hands out for a call under way: a Work to wait for, and its future."""

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

from mpidp.c10d.hosted import Hosted, device_of
from mpidp.c10d.waiting import LONGEST_SECONDS, YIELDS

FOREVER = timedelta(0)  # torch's word for: no time of its own


def tensors_in(result: Any) -> Iterator[torch.Tensor]:
    """Pure."""
    if isinstance(result, torch.Tensor):
        yield result
    else:
        for part in result:
            yield from tensors_in(part)


class Promise(Work):
    """A Work that ends once, with a result or an error. Independent."""

    def __init__(self, result: Any, name: str) -> None:
        super().__init__()
        self.name = name
        self.error: BaseException | None = None
        self._result = result
        self.ending = threading.Event()
        self._lock = threading.Lock()
        self._bell: Any = None
        self._future: Any = None
        self.record: Callable[[], None] | None = None  # to be ended with it

    def end(self, error: BaseException | None = None) -> None:
        """The first word counts."""
        with self._lock:
            if self.ending.is_set():
                return
            self.error = error
            self.ending.set()
            bell = self._bell
        if self.record is not None:
            self.record()
        if bell is not None:
            bell.set_result(None)

    @property
    def ended(self) -> bool:
        return self.ending.is_set()

    def wait(self, timeout: timedelta = FOREVER) -> bool:
        """Raises what went wrong."""
        seconds = timeout.total_seconds() if timeout else 0.0
        if not self._wait(seconds if seconds > 0 else None):
            raise DistBackendError(f"mpi4py: Timed out after {seconds:g} s, waiting for {self.name}")
        if self.error is not None:
            raise self.error
        return True

    def _wait(self, seconds: float | None) -> bool:
        return self.ending.wait(seconds)

    def synchronize(self) -> None:
        """On the host all is done when wait() returns."""
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
        """An error is raised in a callback, which makes it one in C++ too: Future.set_exception would store it as a value, at
        which DDP's reducer crashes."""
        with self._lock:
            if self._future is not None:
                return self._future
            device = device_of(tensors_in(self._result))
            self._bell = torch.futures.Future(devices=[device]) if device is not None else torch.futures.Future()
            self._future = self._bell.then(self._value)
            ended = self.ending.is_set()
        if ended:
            self._bell.set_result(None)
        return self._future

    def _value(self, _: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self._result


class Queued(Promise):
    """A collective that waits for its turn (turns.py)."""

    def __init__(self, work: Callable[[], None], result: Any, name: str, seconds: float) -> None:
        """seconds: that it may take."""
        super().__init__(result, name)
        self.seconds = seconds
        self.number = 0  # among its group's
        self.began = 0.0
        self.told = False  # has it said that it waits?
        self._work: Callable[[], None] | None = work

    def run(self) -> None:
        """By turns.py."""
        work, self._work = self._work, None
        if self.ended or work is None:
            return
        self.began = time.monotonic()
        try:
            work()
        except MPI.Exception as error:
            told = DistBackendError(f"mpi4py: {self.name}: {error}")
            told.__cause__ = error
            self.end(told)
        except BaseException as error:
            self.end(error)
        else:
            self.end()

    def drop(self, error: BaseException) -> None:
        """It will not be run."""
        self._work = None
        self.end(error)


class Message(Promise):
    """A send or a receive, which MPI carries by itself; whoever asks looks."""

    def __init__(self, requests: list[MPI.Request], hosted: Hosted, taken: bool, name: str, seconds: float) -> None:
        super().__init__([hosted.tensor], name)
        self.seconds = seconds
        self._requests = requests
        self._hosted = hosted
        self._taken = taken
        self._source = -1
        self._began = time.monotonic()
        self._looking = threading.Lock()

    def look(self) -> bool:
        """Is it done? It ends it, if so."""
        with self._looking:
            if self.ended:
                return True
            statuses = [MPI.Status() for _ in self._requests]
            try:
                if not MPI.Request.Testall(self._requests, statuses):
                    return False
                if self._taken:
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
            raise DistBackendError(f"mpi4py: {self.name}: {got} bytes came from rank {self._source} for a tensor of {wanted}")
        self._hosted.store()

    def _wait(self, seconds: float | None) -> bool:
        looks, pause = 0, 2e-5
        end = time.monotonic() + (self.seconds if seconds is None else seconds)
        while not self.look():
            looks += 1
            if looks <= YIELDS:
                os.sched_yield()
                continue
            time.sleep(pause)
            pause = min(LONGEST_SECONDS, 1.5 * pause)
            if time.monotonic() > end:
                if seconds is not None:
                    return False
                raise DistBackendError(f"mpi4py: Timed out after {self.seconds:g} s in {self.name}")
        return True

    def settle(self) -> bool:
        """Is nothing of it under way? A receive that nobody met is taken back."""
        if not self.look() and self._taken:
            with self._looking:
                for request in self._requests:
                    request.Cancel()
                    request.Wait()
                self.end(DistBackendError(f"mpi4py: {self.name}: the group was destroyed before"))
        return self.ended

    def is_completed(self) -> bool:
        return self.look()

    def get_future(self) -> Any:
        """Somebody must look for it: a thread, until it is done."""
        future = super().get_future()
        if not self.look():
            threading.Thread(target=self._see_to_it, name="mpidp-c10d-message", daemon=True).start()
        return future

    def _see_to_it(self) -> None:
        try:
            self._wait(None)
        except BaseException as error:
            self.end(error)

    def source_rank(self) -> int:
        """Of the group, once it has come."""
        return self._source

    _source_rank = source_rank


class All(Promise):
    """Several as one: coalesced calls."""

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
        """Done with the last of them."""
        return torch.futures.collect_all([work.get_future() for work in self._works]).then(lambda _: self._result)

"""The order of a group's collectives: one after another, in a thread or, when nobody else is under way, by the caller itself;
and the watch over them: what takes too long ends with an error that says what it was and which ranks did not come.

A rank that has waited for a while says so in the group's store (its number, its call), once. Nobody needs to answer: when time
is up the others' words are read there, and a rank without one is missing.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from mpi4py import MPI
from torch.distributed import DistBackendError

from mpidp.c10d.calls import Calls
from mpidp.c10d.works import Queued

LOOK_SECONDS = 0.1  # between looks of the watch
TELL_SECONDS = 1.0  # that a rank waits before it says so; a third of the time it has, where that is less
STORE_TIMEOUT = timedelta(seconds=10)  # nobody may hold up the watch
NAMED = 8  # ranks by name in one message


class Turns:
    """Of one group. Independent; what is given to it is collective, in the same order on all ranks."""

    def __init__(self, calls: Calls, name: str, store: Any) -> None:
        """store: torch.distributed's, of this group alone."""
        self.calls = calls
        self.name = name
        self.broken: BaseException | None = None
        self.running: Queued | None = None
        self.number = 0
        self._store = store
        self._last: threading.Event | None = None  # of the last call: not the call, which holds tensors
        self._waiting: queue.SimpleQueue[Queued | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._turn = threading.RLock()
        calls.given_up = lambda: self.broken is not None
        _watch.see(self)

    def submit(self, work: Queued, at_once: bool) -> Queued:
        """at_once: the caller will wait for it anyway, and it may be run here. A call out of a future's callback is run where
        that is, within the call that it belongs to."""
        if self.broken is not None:
            work.drop(self.broken)
            return work
        self.number += 1
        work.number = self.number
        within = self._thread is threading.current_thread()
        idle = self._last is None or self._last.is_set()
        if within or (at_once and idle) or MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            self._last = work.ending if not within else self._last
            self._run(work)
            return work
        self._last = work.ending
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name=f"mpidp-c10d-{self.name}", daemon=True)
            self._thread.start()
        self._waiting.put(work)
        return work

    def _loop(self) -> None:
        while (work := self._waiting.get()) is not None:
            self._run(work)
            del work

    def _run(self, work: Queued) -> None:
        with self._turn:
            if self.broken is not None:
                work.drop(self.broken)
                return
            outer, self.running = self.running, work
            try:
                work.run()
            finally:
                self.running = outer
            if work.error is not None and isinstance(work.error.__cause__, MPI.Exception):
                self.break_off(work.error)

    def close(self) -> bool:
        """No more after it; is it at rest? A broken one may have a thread in MPI for ever."""
        _watch.leave(self)
        if self.broken is not None:
            return False
        if self._thread is not None and self._thread is not threading.current_thread():
            self._waiting.put(None)
            self._thread.join()
        self._thread = None
        return True

    def break_off(self, error: BaseException) -> None:
        """What is under way and all that comes ends with this error."""
        self.broken = self.broken or error
        work = self.running
        if work is not None:
            work.end(self.broken)
        while True:  # the thread may be in MPI for ever
            try:
                waiting = self._waiting.get_nowait()
            except queue.Empty:
                break
            if waiting is not None:
                waiting.drop(self.broken)

    def look(self) -> None:
        """By the watch."""
        work = self.running
        if work is None or work.ended or work.began == 0.0 or self.broken is not None:
            return
        waited, patience = time.monotonic() - work.began, min(TELL_SECONDS, work.seconds / 3)
        if waited > patience and not work.told:
            work.told = True
            self._tell(work)
        if waited > work.seconds + patience:  # others had as much time to say that they are here
            self.break_off(DistBackendError(self._accusation(work)))

    def _key(self, number: int) -> str:
        return f"mpidp_waiting/{number}"

    def _tell(self, work: Queued) -> None:
        if self._store is not None:
            with suppress(Exception):
                self._store = self._store.clone()  # with a connection of its own: another thread may wait in the first
                self._store.set_timeout(STORE_TIMEOUT)
            _quietly(lambda: self._store.append(self._key(work.number), f"{self.calls.comm.rank} {work.name};"))

    def _accusation(self, work: Queued) -> str:
        """Who is missing, and who is elsewhere."""
        size = self.calls.comm.size
        said = _quietly(lambda: self._store.get(self._key(work.number)).decode()) if self._store is not None else None
        words = f"mpi4py: Timed out after {work.seconds:g} s in {work.name} (number {work.number} of group {self.name})"
        if said is None:
            return f"{words}; which ranks are missing is not known"
        here: dict[int, str] = {}
        for row in filter(None, said.split(";")):
            rank, _, doing = row.partition(" ")
            here[int(rank)] = doing
        missing = [rank for rank in range(size) if rank not in here]
        elsewhere = [f"rank {rank} is in {doing}" for rank, doing in sorted(here.items()) if doing != work.name]
        if missing:
            words += f": {ranks_in_words(missing)} did not come"
        elif not elsewhere:
            words += ": all ranks have come, and the exchange did not end"
        return words + (f": {', '.join(elsewhere[:NAMED])}" if elsewhere else "")


def ranks_in_words(ranks: list[int]) -> str:
    """Pure."""
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:NAMED]))}{more}"


def _quietly(work: Callable[[], Any]) -> Any:
    """None where the store is gone."""
    try:
        return work()
    except Exception:
        return None


class Watch:
    """One thread for all groups of the process."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[Turns] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def see(self, turns: Turns) -> None:
        """Look after this one too."""
        with self._lock:
            self._all.add(turns)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="mpidp-c10d-watch", daemon=True)
                self._thread.start()

    def leave(self, turns: Turns) -> None:
        """No more."""
        with self._lock:
            self._all.discard(turns)

    def _loop(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            self._look()

    def _look(self) -> None:
        with self._lock:
            every = list(self._all)
        for turns in every:
            _quietly(turns.look)


_watch = Watch()

"""Runs a group's collectives in order, and checks their timeouts.

The collectives of a group run one after another in the group's thread. If the group is idle, a collective may run in the caller's
thread. If a call takes too long, a watch thread ends it with an error that names the call and the missing ranks. To find the
missing ranks, each rank that has waited for some time writes its rank and its call to the group's store. A rank is missing if it
has written nothing by the end of the timeout.
"""

from __future__ import annotations

import queue
import re
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

CHECK_SECONDS = 0.1  # time between two checks by the watch thread
REPORT_SECONDS = 1.0  # a rank writes to the store after waiting this long, or for a third of the timeout if that is shorter
STORE_TIMEOUT = timedelta(seconds=10)  # timeout of the store, so that the store cannot block the watch thread
NAMED = 8  # the largest number of ranks that one message lists


class Turns:
    """The queue of one group's collectives. The methods do not wait for other ranks, but all ranks must submit the same
    collectives in the same order."""

    def __init__(self, calls: Calls, name: str, store: Any) -> None:
        """`calls`: runs the collectives. `name`: the name of the group. `store`: a torch store that only this group uses, or
        None."""
        self.calls = calls
        self.name = name
        self.broken: BaseException | None = None
        self.running: Queued | None = None
        self.number = 0
        self._store = store
        self._last: threading.Event | None = None  # set when the last call ends; a reference to the call would keep tensors alive
        self._waiting: queue.SimpleQueue[Queued | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._turn = threading.RLock()
        calls.aborted = lambda: self.broken is not None
        _watch.add(self)

    def submit(self, work: Queued, at_once: bool) -> Queued:
        """Queue a collective, and return it. Run it immediately instead if `at_once` is true and the group is idle.

        `at_once`: whether the caller will wait for the collective at once. A collective that the group's own thread submits, in
        the callback of a future, always runs immediately. Without THREAD_MULTIPLE, every collective runs immediately.
        """
        if self.broken is not None:
            work.drop(self.broken)
            return work
        self.number += 1
        work.number = self.number
        within = self._thread is threading.current_thread()
        idle = self._last is None or self._last.is_set()
        if within or (at_once and idle) or MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            self._last = work.finished if not within else self._last
            self._run(work)
            return work
        self._last = work.finished
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
                self.abort(work.error)

    def close(self) -> bool:
        """Finish the queued calls, stop the thread, and return True.

        If the group is broken, return False without waiting, because the group's thread may never return from MPI.
        """
        _watch.remove(self)
        if self.broken is not None:
            return False
        if self._thread is not None and self._thread is not threading.current_thread():
            self._waiting.put(None)
            self._thread.join()
        self._thread = None
        return True

    def abort(self, error: BaseException) -> None:
        """Mark the group as broken. The running call, the queued calls and all later calls end with `error`, or with the error
        of an earlier abort()."""
        self.broken = self.broken or error
        work = self.running
        if work is not None:
            work.end(self.broken)
        while True:  # empty the queue here, because the thread may never return from MPI
            try:
                waiting = self._waiting.get_nowait()
            except queue.Empty:
                break
            if waiting is not None:
                waiting.drop(self.broken)

    def check_timeout(self) -> None:
        """If the running call has waited for some time, write this rank and the call to the store, once per call. If the
        call's timeout has passed, abort the group. The watch thread calls this method."""
        work = self.running
        if work is None or work.ended or work.began == 0.0 or self.broken is not None:
            return
        waited, grace = time.monotonic() - work.began, min(REPORT_SECONDS, work.seconds / 3)
        if waited > grace and not work.reported:
            work.reported = True
            self._report_waiting(work)
        if waited > work.seconds + grace:  # other ranks have had time to write to the store
            self.abort(DistBackendError(self._timeout_message(work)))

    def _key(self, number: int) -> str:
        return f"mpidp_waiting/{number}"

    def _report_waiting(self, work: Queued) -> None:
        if self._store is not None:
            with suppress(Exception):
                self._store = self._store.clone()  # a new connection, because another thread may be waiting on the first one
                self._store.set_timeout(STORE_TIMEOUT)
            _quietly(lambda: self._store.append(self._key(work.number), f"{self.calls.comm.rank} {work.name};"))

    def _timeout_message(self, work: Queued) -> str:
        """Return the message about a call that timed out. It names the ranks that did not join the call, and the ranks that are
        in another call."""
        size = self.calls.comm.size
        key = self._key(work.number)
        entries = _quietly(lambda: self._store.get(key).decode(errors="replace")) if self._store is not None else None
        message = f"mpi4py: Timed out after {work.seconds:g} s in {work.name} (call {work.number} of group {self.name})"
        if entries is None:
            return f"{message}; the missing ranks are unknown"
        waiting = waiting_ranks(entries, size)
        missing = [rank for rank in range(size) if rank not in waiting]
        elsewhere = [f"rank {rank} is in {name}" for rank, name in sorted(waiting.items()) if name != work.name]
        if missing:
            message += f": {format_ranks(missing)} did not join"
        elif not elsewhere:
            message += ": all ranks joined, but the call did not complete"
        return message + (f"{';' if missing else ':'} {', '.join(elsewhere[:NAMED])}" if elsewhere else "")


def waiting_ranks(entries: str, size: int) -> dict[int, str]:
    """Return {rank: the call in which it waits}. `entries`: the text in the store, which has "RANK CALL;" for each waiting rank.
    Other text is ignored, because any process that reaches the store can write to it. Pure."""
    found = re.findall(r"(?:^|;)(\d{1,9}) ([ -:<-~]{1,80})(?=;)", entries)
    return {int(rank): name for rank, name in found if int(rank) < size}


def format_ranks(ranks: list[int]) -> str:
    """Return a text such as "rank 3" or "ranks 1, 2 and 5 more". Pure."""
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:NAMED]))}{more}"


def _quietly(work: Callable[[], Any]) -> Any:
    """Return the result of work(), or None if work() raises an exception, for example because the store's server has exited."""
    try:
        return work()
    except Exception:
        return None


class Watch:
    """A thread that checks the timeouts of all groups of the process."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[Turns] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, turns: Turns) -> None:
        """Start checking a group's timeouts."""
        with self._lock:
            self._all.add(turns)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="mpidp-c10d-watch", daemon=True)
                self._thread.start()

    def remove(self, turns: Turns) -> None:
        """Stop checking a group's timeouts."""
        with self._lock:
            self._all.discard(turns)

    def _loop(self) -> None:
        while True:
            time.sleep(CHECK_SECONDS)
            self._check()

    def _check(self) -> None:
        with self._lock:
            every = list(self._all)
        for turns in every:
            _quietly(turns.check_timeout)


_watch = Watch()

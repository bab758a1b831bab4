"""Repeats failed requests until a time limit. The pause before a try is about twice the previous pause, with a random factor. A
warning names the server and the problem."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from mpidp.errors import DataError
from mpidp.runtime.log import log
from mpidp.storage.address import without_secrets
from mpidp.storage.store import Missing, Refused, Unreachable

T = TypeVar("T")
FIRST_SECONDS = 20.0  # time limit if the server has never answered, because the address may be wrong
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 15.0  # seconds between two tries
QUIET_SECONDS = 30.0  # least time between two warnings


class Retries:
    """Sends the requests to one store, and repeats failed requests. Thread-safe. Independent."""

    def __init__(self, seconds: float, setting: str = "data.retry_seconds") -> None:
        """`seconds`: the time limit for repeating a failed request. `setting`: the name of the setting that contains this
        limit, for error messages."""
        self.seconds, self._setting = seconds, setting
        self._answered = False
        self._warned_at = -QUIET_SECONDS
        self._on_wait: Callable[[], None] = lambda: None
        self._closed = threading.Event()
        self._random = random.Random()  # not the global generator, because training may use it

    def report_waits(self, on_wait: Callable[[], None]) -> None:
        """Call `on_wait` about every second during a pause between two tries, and after each answer. Independent."""
        self._on_wait = on_wait

    def close(self) -> None:
        """End the current pauses, and stop repeating failed requests. Independent."""
        self._closed.set()

    def call(self, where: str, request: Callable[[], T]) -> T:
        """Call request() and return its result. Repeat the call while it raises Unreachable. `where`: the address, for
        messages. Raises Missing if the file is missing. Raises DataError, with the reason, if the server refuses the request
        or the time limit is over. Independent."""
        began, pause, tries = time.monotonic(), FIRST_PAUSE, 0
        while True:
            try:
                result = request()
            except Missing:
                self._answered = True
                raise
            except Refused as error:
                raise DataError(f"{where}: {without_secrets(str(error))}") from None
            except Unreachable as error:
                tries, reason = tries + 1, without_secrets(str(error))
            else:
                self._answered = True
                self._on_wait()
                if tries > 1:
                    log.info("%s answers again after %d tries and %.0f s", where, tries + 1, time.monotonic() - began)
                return result
            limit, spent = self.seconds if self._answered else min(FIRST_SECONDS, self.seconds), time.monotonic() - began
            if spent + pause > limit or self._closed.is_set():
                times = "1 try" if tries == 1 else f"{tries} tries"
                raise DataError(f"{where}: {reason}. mpidp gave up after {times} in {spent:.0f} s (the limit is {limit:g} s, "
                                f"see {self._setting}). Nothing is lost. Start the same command again when the server answers")
            if tries > 1:
                self._warn(f"warning: {where}: {reason}; try {tries} failed, trying again for up to {limit - spent:.0f} s")
            self._pause(pause * (0.5 + self._random.random()))
            pause = min(LONGEST_PAUSE, 2 * pause)

    def _warn(self, line: str) -> None:
        now = time.monotonic()
        if now - self._warned_at >= QUIET_SECONDS:
            self._warned_at = now
            log.warning("%s", line)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._closed.wait(min(1.0, left)):
            self._on_wait()

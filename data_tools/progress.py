"""A line of progress on standard error for commands that take minutes: every 2 s on a terminal, every 10 s in a log."""

from __future__ import annotations

import sys
import time

MEGABYTE = 10**6


class Ticker:
    """Counts work, and says from time to time how far it is. Independent."""

    def __init__(self, what: str, quiet: bool = False) -> None:
        """what: the first words of each line. quiet: never print, for all ranks but one."""
        self._what, self._quiet = what, quiet
        self._began = self._next = time.monotonic()
        self._next += self._pause()
        self.documents = self.bytes = 0

    def add(self, documents: int = 0, size: int = 0, note: str = "") -> None:
        """Count documents and bytes; print a line if it is time. note: what else to say, for example the file that is read."""
        self.documents, self.bytes = self.documents + documents, self.bytes + size
        now = time.monotonic()
        if self._quiet or now < self._next:
            return
        self._next = now + self._pause()
        self.say(f"{self.documents:,} documents, {self.bytes / MEGABYTE:,.0f} MB{', ' * bool(note)}{note}")

    def say(self, text: str) -> None:
        """Print a line with the time since the beginning."""
        if not self._quiet:
            print(f"{self._what}: {time.monotonic() - self._began:.0f} s, {text}", file=sys.stderr, flush=True)

    @staticmethod
    def _pause() -> float:
        return 2.0 if sys.stderr.isatty() else 10.0

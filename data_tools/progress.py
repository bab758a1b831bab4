"""Shows a line of progress on standard error, for commands that take minutes. On a terminal the line is replaced every 2 s. In a
log a new line is written every 10 s."""

from __future__ import annotations

import sys
import time

MEGABYTE = 10**6
ON_TERMINAL, IN_LOG = 2.0, 10.0  # seconds between two lines


class Ticker:
    """Counts the finished work, and prints the progress at intervals. Independent."""

    def __init__(self, what: str = "", quiet: bool = False) -> None:
        """what: the first words of each line. quiet: whether to print nothing, as on all ranks but one."""
        self._what, self._quiet, self._terminal = what, quiet or not what, sys.stderr.isatty()
        self._pause = ON_TERMINAL if self._terminal else IN_LOG
        self._began = time.monotonic()
        self._next = self._began + self._pause
        self.phase("")

    def phase(self, name: str, parts: int = 0, unit: str = "file") -> None:
        """Begin a new phase, in which counting starts at 0. unit: what the phase consists of, for example "file". parts: the
        number of these units (0: unknown)."""
        self._phase, self._parts, self._unit = name, parts, unit
        self.documents = self.bytes = self.part = 0

    def add(self, documents: int = 0, size: int = 0, parts: int = 0) -> None:
        """Add to the counts of documents, bytes (`size`) and begun units (`parts`). Print a line if the interval has passed."""
        self.documents, self.bytes, self.part = self.documents + documents, self.bytes + size, self.part + parts
        now = time.monotonic()
        if self._quiet or now < self._next:
            return
        self._next = now + self._pause
        said = [f"{self.documents:,} documents", f"{self.bytes / MEGABYTE:,.0f} MB"]
        if self._parts:
            said.append(f"{self._unit} {self.part:,} of {self._parts:,}")
        self._print(f"{self._phase}{': ' * bool(self._phase)}{', '.join(said)}")

    def say(self, text: str) -> None:
        """Print a line immediately, before work that cannot report its progress."""
        if not self._quiet:
            self._print(text)

    def close(self) -> None:
        """Remove the line from a terminal."""
        if self._terminal and not self._quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        line = f"{self._what}: {time.monotonic() - self._began:.0f} s, {text}"
        print(f"\r{line}\x1b[K" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr, flush=True)

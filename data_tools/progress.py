"""Shows the progress of commands that take minutes, as a line on standard error. On a terminal, the line is replaced every 2 s.
In a log file, a new line is written every 10 s."""

from __future__ import annotations

import sys
import time

MEGABYTE = 10**6
ON_TERMINAL, IN_LOG = 2.0, 10.0  # seconds between two lines


class Ticker:
    """Counts the finished work and prints the counts at intervals. Independent."""

    def __init__(self, what: str = "", quiet: bool = False) -> None:
        """`what`: the first words of each line ("": print nothing). `quiet`: whether to print nothing, as on all ranks except
        one."""
        self._what, self._quiet, self._terminal = what, quiet or not what, sys.stderr.isatty()
        self._pause = ON_TERMINAL if self._terminal else IN_LOG
        self._began = time.monotonic()
        self._next = self._began + self._pause
        self.phase("")

    def phase(self, name: str, parts: int = 0, unit: str = "file") -> None:
        """Begin a new phase of the work, and set all counts to 0. `name`: the name of the phase in the printed lines. `unit`:
        what the phase processes one after the other, for example "file". `parts`: the number of these units (0: unknown)."""
        self._phase, self._parts, self._unit = name, parts, unit
        self.documents = self.bytes = self.part = 0

    def add(self, documents: int = 0, size: int = 0, parts: int = 0) -> None:
        """Add to the three counts: finished documents (`documents`), finished bytes (`size`), and started units, such as files
        (`parts`; see phase()). Print a line if the last line is older than the interval."""
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
        """Print this text now. Use this before work that cannot report its progress."""
        if not self._quiet:
            self._print(text)

    def close(self) -> None:
        """Remove the line if it is on a terminal."""
        if self._terminal and not self._quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        line = f"{self._what}: {time.monotonic() - self._began:.0f} s, {text}"
        print(f"\r{line}\x1b[K" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr, flush=True)

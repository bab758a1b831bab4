"""The logger "mpidp". Each message is one bare line, on standard output up to level info and on standard error from warning.

The environment variable MPIDP_LOG sets the level: debug, info (default), warning or error. The caller decides which rank logs a
message, usually rank 0. Results, tables and progress are printed, not logged.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys

from mpidp.errors import UsageError

VARIABLE = "MPIDP_LOG"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _BareHandler(logging.Handler):
    """Writes the bare message to the current sys.stdout or sys.stderr. Takes no lock: the watchdog's thread must be able to log
    while the main thread is blocked in a write."""

    def createLock(self) -> None:  # noqa: N802
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        stream.write(f"{record.getMessage()}\n")
        stream.flush()


log = logging.getLogger("mpidp")
if not log.handlers:
    log.addHandler(_BareHandler())
    log.propagate = False
    log.setLevel(LEVELS.get(os.environ.get(VARIABLE, "").lower(), logging.INFO))


def set_level() -> None:
    """Set the level from MPIDP_LOG. Raises UsageError if it is not a level. Independent."""
    name = os.environ.get(VARIABLE, "").lower() or "info"
    if name not in LEVELS:
        nearest = difflib.get_close_matches(name, LEVELS, n=1, cutoff=0.0)[0]
        raise UsageError(f"{VARIABLE}={name} is not one of {', '.join(LEVELS)}; did you mean {nearest!r}?")
    log.setLevel(LEVELS[name])

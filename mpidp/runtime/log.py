"""The logger "mpidp". Each message is one line without prefix. Messages of the levels debug and info go to standard output,
and messages of higher levels go to standard error. The environment variable MPIDP_LOG sets the lowest level that is shown:
debug, info (default), warning or error. The caller decides which rank logs a message, usually rank 0. Results, tables and
progress are printed, not logged."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys

from mpidp.errors import UsageError

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
VARIABLE = "MPIDP_LOG"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def printable(text: str) -> str:
    """Return the text with escapes such as \\x1b in place of control characters, unpaired surrogates and bidirectional
    controls. This prevents a name in an untrusted file from changing what the terminal shows. Newlines and tabs are kept.
    Pure."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Return the text with escapes in place of newlines, tabs, and the characters that printable() replaces. Pure."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


class _BareHandler(logging.Handler):
    """Writes the message without prefix to the current sys.stdout or sys.stderr. It takes no lock, so the watchdog's thread can
    log while the main thread is blocked in a write."""

    def createLock(self) -> None:  # noqa: N802
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        stream.write(f"{printable(record.getMessage())}\n")
        stream.flush()


log = logging.getLogger("mpidp")
if not log.handlers:
    log.addHandler(_BareHandler())
    log.propagate = False
    log.setLevel(LEVELS.get(os.environ.get(VARIABLE, "").lower(), logging.INFO))


def counted(number: int, what: str) -> str:
    """Return a number with its noun, for example "1 rank" or "2,000 ranks". `what`: the noun in the singular. Pure."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def set_level() -> None:
    """Set the logger's level to that of the environment variable MPIDP_LOG. Raises UsageError if the variable names no level.
    Independent."""
    name = os.environ.get(VARIABLE, "").lower() or "info"
    if name not in LEVELS:
        nearest = difflib.get_close_matches(name, LEVELS, n=1, cutoff=0.0)[0]
        raise UsageError(f"{VARIABLE}={name} is not one of {', '.join(LEVELS)}; did you mean {nearest!r}?")
    log.setLevel(LEVELS[name])

"""Being asked to stop: a signal or a file sets a flag; the ranks agree on it in the step. No MPI call in a handler."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType


class StopRequest:
    """Set by SIGUSR1 (the one signal that both mpiruns hand on), SIGTERM, SIGINT, or a file STOP in run.dir. Independent."""

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(self, stop_file: Path | None) -> None:
        """stop_file: looked for by wanted(); None on ranks that need not look."""
        self.reason = ""
        self._stop_file = stop_file
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def wanted(self) -> bool:
        """Has this rank been asked to stop?"""
        if not self.reason and self._stop_file is not None and self._stop_file.exists():
            self.reason = f"file {self._stop_file}"
        return bool(self.reason)

    def close(self) -> None:
        """Give the signals back, and take the file away: it was obeyed."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._stop_file is not None and self.reason:
            self._stop_file.unlink(missing_ok=True)

"""Sends the lines of metrics.jsonl from rank 0 to the processes of the trackers. During training, a slow process does not
delay rank 0."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mpidp
from mpidp.metrics.track.tracked import compact
from mpidp.runtime.environment import LAUNCHER_PREFIXES
from mpidp.runtime.log import log

MAX_LINES = 10_000  # lines that wait in memory while the pipe is full
PATIENCE_SECONDS = 60.0  # if a call of a tracker takes longer, its process prints a warning
FINISH_SECONDS = 30.0  # time limit at the end of a run, for all trackers together


class Trackers:
    """The trackers of a run. Only finish() waits. If a tracker fails, a warning is logged, and no exception is raised.
    Independent."""

    def __init__(self, names: Sequence[str], about: Mapping[str, Any]) -> None:
        """Start a process for each tracker in `names`. about: the fields of tracked.TrackedRun."""
        self._processes = [_Process(name, about) for name in names]

    def write(self, line: Mapping[str, Any]) -> None:
        """Send a line of metrics.jsonl to all trackers."""
        if self._processes:
            raw = json.dumps(compact(line)).encode() + b"\n"
            for process in self._processes:
                process.send(raw)

    def close(self) -> None:
        """Send no more lines. Each tracker stores the lines that it has got, and ends."""
        for process in self._processes:
            process.end_input()

    def finish(self) -> None:
        """Wait until the trackers have stored all lines, for at most FINISH_SECONDS. Then stop the trackers that have not
        finished."""
        until = time.monotonic() + FINISH_SECONDS
        for process in self._processes:
            process.finish(until)
        self._processes = []


class _Process:
    """The process of a tracker, and the lines that wait because the pipe to the process is full."""

    def __init__(self, name: str, about: Mapping[str, Any]) -> None:
        self.name, self._waiting, self._left_out = name, deque[bytes](), 0
        folder, package = Path(str(about["folder"])), Path(mpidp.__file__).parents[1]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES)}  # a tracker is not a rank
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), environment.get("PYTHONPATH", "")]))
        self._child: subprocess.Popen[bytes] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._child = subprocess.Popen(
                [sys.executable, "-m", "mpidp.metrics.track.process", name, str(folder / f"{name}.log"), str(PATIENCE_SECONDS),
                 str(FINISH_SECONDS)],
                stdin=subprocess.PIPE, env=environment, start_new_session=True,
            )
            assert self._child.stdin is not None
            os.set_blocking(self._child.stdin.fileno(), False)
        except OSError as error:
            self._lost(f"its process cannot be started ({error.strerror or error})")
        self.send(json.dumps(dict(about)).encode() + b"\n")

    def send(self, raw: bytes) -> None:
        if self._child is None:
            return
        if len(self._waiting) < MAX_LINES:
            self._waiting.append(raw)
        else:
            self._left_out += 1
        self._push()

    def _push(self) -> None:
        """Write waiting lines until the pipe is full."""
        assert self._child is not None and self._child.stdin is not None
        try:
            while self._waiting:
                line = self._waiting[0]
                written = os.write(self._child.stdin.fileno(), line)
                if written == len(line):
                    self._waiting.popleft()
                else:
                    self._waiting[0] = line[written:]
        except BlockingIOError:
            pass
        except OSError:
            code = self._ended(1.0)
            # With exit codes 0 and 1, the process has printed the reason.
            self._lost("" if code in (0, 1) else f"its process has ended (exit code {code})")

    def _ended(self, seconds: float) -> int | None:
        assert self._child is not None
        with suppress(subprocess.TimeoutExpired):
            return self._child.wait(seconds)
        return None

    def _lost(self, why: str) -> None:
        """Stop sending. why: the text of a warning, or "" if the process itself has printed one."""
        if why:
            log.warning("warning: metrics.track=%s: %s. Training continues, and metrics.jsonl has all numbers", self.name, why)
        self._child = None
        self._waiting.clear()

    def end_input(self) -> None:
        if self._child is not None:
            self._push()
        if self._child is not None and not self._waiting:
            self._close()

    def _close(self) -> None:
        assert self._child is not None and self._child.stdin is not None
        with suppress(OSError):
            self._child.stdin.close()

    def finish(self, until: float) -> None:
        while self._child is not None and self._waiting and time.monotonic() < until:
            time.sleep(0.02)
            self._push()
        if self._child is None:
            return
        self._close()
        code = self._ended(max(0.1, until - time.monotonic()))
        if code is None:
            with suppress(OSError):
                os.killpg(self._child.pid, signal.SIGKILL)  # also the processes that the tracker has started
            self._child.wait()
            self._lost(f"its process has not stored all numbers in {FINISH_SECONDS:g} s, and was stopped")
        elif code not in (0, 1):
            self._lost(f"its process ended with exit code {code}")
        elif self._left_out:
            self._lost(f"{self._left_out} lines came too fast and were left out")

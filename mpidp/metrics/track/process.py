"""The process of one tracker: `python -m mpidp.metrics.track.process NAME LOG PATIENCE_SECONDS FINISH_SECONDS`.

It reads JSON lines from standard input. The first line has the fields of the TrackedRun, and the others are lines of
metrics.jsonl. Training only writes to a pipe, so a slow or failing tracker cannot delay training. The output of the tracker
goes to LOG. Warnings go to the standard error of the run, at most one of each kind. If a call of the tracker takes longer than
PATIENCE_SECONDS, there is a warning. The process ends at the end of the input, at most FINISH_SECONDS later.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mpidp.metrics.track.tracked import TrackedRun, Tracker, kind_of
from mpidp.runtime.files import write_file
from mpidp.storage.address import without_secrets

MAX_LINES = 10_000  # maximum number of lines that wait for a slow tracker; further lines are left out
MAX_BATCH = 200  # maximum number of lines in one call
BATCH_SECONDS = 1.0  # lines that arrive within this time are passed to the tracker in one call
SAVE_SECONDS = 10.0  # time between two writes of the state
ADVICE = "Training continues, and metrics.jsonl has all numbers"


class Warnings:
    """Prints warnings on the standard error of the run, at most one of each kind."""

    def __init__(self, name: str, stream: Any, seconds: float) -> None:
        """name: the name of the tracker. stream: the file for the warnings. seconds: the time limit of patience()."""
        self._name, self._stream, self._seconds, self._said = name, stream, seconds, set[str]()

    def say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            with suppress(OSError, ValueError):
                print(f"warning: metrics.track={self._name}: {text}. {ADVICE}", file=self._stream, flush=True)

    @contextmanager
    def patience(self, what: str) -> Iterator[None]:
        """Return a context manager. If the code inside takes longer than `seconds`, print a warning. what: a description of
        this code."""
        text = f"{what} has not finished after {self._seconds:g} s"
        timer = threading.Timer(self._seconds, self.say, ("slow", text))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class Inbox:
    """Receives the lines of the run. A thread reads each line immediately, so the run never has to wait."""

    def __init__(self, stream: Any, seconds: float, overdue: Callable[[], None]) -> None:
        """overdue: a function that is called `seconds` after the end of the input."""
        self._stream, self._seconds, self._overdue = stream, seconds, overdue
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.left_out = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for raw in self._stream:
            with suppress(ValueError):  # a line that is incomplete because the run was killed
                line = json.loads(raw)
                if self._lines.qsize() < MAX_LINES:
                    self._lines.put(line)
                else:
                    self.left_out += 1
        self._lines.put(None)
        time.sleep(self._seconds)
        self._overdue()

    def batches(self) -> Iterator[list[dict[str, Any]]]:
        """Yield lists of lines until the end of the input. A list has the lines that arrive within BATCH_SECONDS, but at most
        MAX_BATCH lines."""
        while (line := self._lines.get()) is not None:
            batch, until = [line], time.monotonic() + BATCH_SECONDS
            while len(batch) < MAX_BATCH:
                try:
                    line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if line is None:
                    self._lines.put(None)
                    break
                batch.append(line)
            yield batch

    def first(self) -> dict[str, Any] | None:
        """Return the first line, or None if the input is empty."""
        return self._lines.get()


class State:
    """The contents of RUN/track/NAME.json: the id of the run and, for each kind of line, the last step that was written. A lock
    keeps two processes from using the file at the same time."""

    def __init__(self, path: Path, seconds: float) -> None:
        """seconds: how long to wait for the lock, which the process of an earlier job may hold. After this time, the file is
        used without a lock."""
        self.path, self._lock = path, open(path.with_suffix(".lock"), "ab")  # noqa: SIM115
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        self._saved = 0.0
        self.values: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            found = json.loads(path.read_text())
            self.values = found if isinstance(found, dict) and isinstance(found.get("id"), str) else {}
        self.values.setdefault("id", os.urandom(4).hex())
        last = self.values.get("last")
        self.last: dict[str, int] = {k: v for k, v in last.items() if isinstance(v, int)} if isinstance(last, dict) else {}

    def wrote(self, batch: list[dict[str, Any]]) -> None:
        """Record the steps of lines that the tracker has written. batch: these lines. Save the state if the last save is more
        than SAVE_SECONDS old."""
        for line in batch:
            self.last[kind_of(line)] = max(self.last.get(kind_of(line), -1), line["step"])
        if time.monotonic() > self._saved + SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Save the state. Errors such as a full disk are ignored."""
        self._saved = time.monotonic()
        with suppress(OSError):
            write_file(self.path, json.dumps(self.values | {"last": self.last}).encode())


def serve(name: str, stream: Any, warnings: Warnings, seconds: float) -> int:
    """Open the tracker, and pass lines from `stream` to it until the input ends. Return the exit code. name: the name of the
    tracker. seconds: time limit after the end of the input. Independent."""
    inbox = Inbox(stream, seconds, lambda: os._exit(3))
    about = inbox.first()
    if about is None:
        return 0
    path = Path(about["folder"]) / f"{name}.json"
    what = "opening the tracker"
    try:
        with warnings.patience(what):
            state = State(path, seconds + 5.0)
            before, run = dict(state.last), TrackedRun(**about, state=state.values)
            module = importlib.import_module(f"mpidp.metrics.track.{name}")
            tracker: Tracker = getattr(module, f"{name.capitalize()}Tracker")(run)
            state.save()
            if tracker.note:
                warnings.say("note", without_secrets(tracker.note))
    except BaseException as error:  # noqa: BLE001 - a tracker may also raise SystemExit
        warnings.say("failed", f"{what} failed ({_short(error)})")
        return 1
    waiting: list[dict[str, Any]] = []
    ended, failures, next_try = False, 0, 0.0
    what = "a call of the tracker"
    for batch in inbox.batches():
        waiting += [one for one in batch if tracker.purges or "event" in one or one["step"] > before.get(kind_of(one), -1)]
        ended = ended or any(one.get("event") == "end" for one in batch)
        if len(waiting) > MAX_LINES:
            inbox.left_out += len(waiting) - MAX_LINES
            waiting = waiting[-MAX_LINES:]
        if time.monotonic() < next_try:
            continue
        with warnings.patience(what):
            try:
                tracker.write(waiting)
                state.wrote(waiting)
                waiting, failures = [], 0
            except Exception as error:  # noqa: BLE001
                failures += 1
                next_try = time.monotonic() + min(60.0, 2.0**failures)
                warnings.say("failed", f"{what} failed ({_short(error)}), and will be repeated")
    try:
        if waiting:
            tracker.write(waiting)
            state.wrote(waiting)
        state.save()
        tracker.close(ended)
    except Exception as error:  # noqa: BLE001
        warnings.say("failed", f"{what} failed ({_short(error)})")
    if inbox.left_out:
        warnings.say("left out", f"{inbox.left_out} lines came too fast and were left out")
    return 0


def _short(error: BaseException) -> str:
    return without_secrets(f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]


def main() -> None:
    """Run the tracker that the command line names. Independent."""
    name, log_path, patience, finish = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM):  # schedulers signal all processes; the end of the input ends this one
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError, AttributeError):
        os.nice(10)
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # a rank may be bound to one core
    stream, said = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(2), "w", errors="replace")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with suppress(OSError):
        log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
    code = serve(name, stream, Warnings(name, said, float(patience)), float(finish))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # skips the exit handlers of the tracker, which may hang


if __name__ == "__main__":
    main()

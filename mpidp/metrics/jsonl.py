"""Writes and reads RUN/metrics.jsonl, which has one JSON line per step, evaluation or event."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Required, TypedDict

from mpidp.errors import UsageError
from mpidp.metrics.track.sender import Trackers
from mpidp.runtime.files import open_regular, write_file
from mpidp.runtime.json_file import parse_json, parse_json_lines, read_json_lines
from mpidp.runtime.log import log

LARGEST = 1e100  # larger numbers are ignored, because their sums and products could overflow
TAIL_BYTES = 1 << 16  # bytes at the end of the file that are searched for the last lines of a failed rank 0


class _Data(TypedDict, total=False):
    path: str
    index_sha256: str
    train_tokens: int
    val_tokens: int


class Line(TypedDict, total=False):
    """The keys whose types are checked when a line is read. The values of other keys may have any type. Read them with
    number()."""

    step: Required[int]
    event: str
    batch: int
    skipped: int
    train_loss: float | None
    val_loss: float | None
    grad_norm: float | None
    lr: float | None
    tokens: float
    comm_bytes: float
    step_seconds: float
    unix_seconds: float
    reason: str
    weights_sha256: str
    nodes: dict[str, int]
    versions: dict[str, str]
    fingerprint: dict[str, Any]
    data: _Data
    parameters: int
    energy_of: list[str]
    rank_compute_seconds: list[float]
    rank_data_seconds: list[float]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl. If the file does not exist, return an empty list. Damaged lines are left out, and a
    warning is logged. Raises UsageError if the file cannot be read. Independent."""
    try:
        lines, damaged = read_json_lines(path, Line)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error
    if damaged:
        log.warning("warning: %s: %d damaged line%s ignored", path, damaged, "s are" if damaged > 1 else " is")
    return lines


class MetricsFile:
    """Writes RUN/metrics.jsonl on rank 0. Each line is a JSON object, and is written to the file immediately."""

    def __init__(
        self, path: Path, step: int, next_batch: int, latest: Sequence[Mapping[str, Any]] | None = None,
        also: Trackers | None = None,
    ) -> None:
        """Open the file. Delete damaged lines, and lines that the resumed run will write again.

        step: lines of later steps are deleted. next_batch: lines of the batch with this number and of later batches are
        deleted. latest: None, or, if this rank replaces a failed rank 0, the last lines of that rank. In this case, the lines
        of `latest` that the file lacks are added, and `step` and `next_batch` are ignored. also: trackers that get the same
        lines. Raises UsageError if the file cannot be read or written.
        """
        self._path = path
        self.also: Trackers | None = None  # trackers that receive each new line, too
        self.lost: dict[str, float] = {}  # time, steps and energy of the deleted lines
        try:
            if latest is not None:
                self._repair(latest)
            elif path.exists():
                self._drop(step, next_batch)
            self._file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"{path} cannot be read and written ({error.strerror}). Move it away, or free disk space") from error
        self._late = b""  # bytes that could not be written yet because the disk is full
        self._warned = False
        self.also = also

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line. A number that is not finite becomes null. If the disk is full, the line is kept in memory until it can
        be written."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        if self.also is not None:
            self.also.write(plain)
        self._late += json.dumps(plain, allow_nan=False).encode() + b"\n"
        try:
            while self._late:
                self._late = self._late[self._file.write(self._late) :]
        except OSError as error:  # a full disk must not stop training
            if not self._warned:
                log.warning("warning: %s cannot be written (%s). Until the file can be written, lines are kept in memory",
                            self._path, error)
            self._warned = True

    def _drop(self, step: int, next_batch: int) -> None:
        """Delete the lines of steps after `step`, the lines of batches from `next_batch` on, the `end` line, and damaged
        lines."""
        read_lines(self._path)  # warns of damaged lines
        with open_regular(self._path) as file:
            lines = file.read().split(b"\n")
        kept = [line for line in lines if _belongs(line, step, next_batch)]
        self.lost = lost(list(parse_json_lines(lines, Line)), list(parse_json_lines(kept, Line)))
        write_file(self._path, b"".join(line + b"\n" for line in kept))

    def _repair(self, latest: Sequence[Mapping[str, Any]]) -> None:
        """Delete an incomplete last line and the `end` line. Add the lines of `latest` that the file lacks."""
        with open(self._path, "rb+") as file:
            start = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
            file.seek(start)
            lines = file.read().splitlines(keepends=True)
            while lines and (not lines[-1].endswith(b"\n") or b'"event": "end"' in lines[-1]):
                lines.pop()
            file.truncate(start + sum(map(len, lines)))
        known = {_kind(line) for line in parse_json_lines(lines[bool(start) :], Line)}
        self._file, self._late, self._warned = open(self._path, "ab", buffering=0), b"", False  # noqa: SIM115
        for line in latest:
            if _kind(line) not in known:
                self.write(line)
        self._file.close()

    def close(self) -> None:
        """Close the file. Lines in memory are lost if the disk is still full."""
        with suppress(OSError):
            self._file.write(self._late)
            os.fsync(self._file.fileno())
        self._file.close()
        if self.also is not None:
            self.also.close()


def past(path: Path) -> tuple[int, float]:
    """Return (number of restarts and recoveries, seconds of training). path: a run's metrics.jsonl. Independent."""
    lines = read_lines(path)
    failures = sum(line.get("event") in ("resume", "recovered") for line in lines)
    return failures, sum(line.get("step_seconds", 0.0) for line in lines)


def number(line: Mapping[str, Any], name: str) -> float | None:
    """Return the number `name` of a line, or None if it is missing, not finite, or larger than LARGEST. Pure."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < LARGEST else None  # also false for nan


def took(lines: Iterable[Mapping[str, Any]]) -> Iterator[float]:
    """Yield, for each line, the seconds of work since the previous line.

    For a `start` line, yield at most its setup_seconds, because no job worked on the run before the start. The lost_seconds of
    this line are not included. For a line without a time, yield 0. Pure.
    """
    before = None
    for line in lines:
        if (now := number(line, "unix_seconds")) is None:
            yield 0.0
            continue
        gap = now - before if before is not None else math.inf
        if line.get("event") == "start":
            gap = min(gap - (number(line, "lost_seconds") or 0.0), number(line, "setup_seconds") or 0.0)
        yield max(0.0, gap) if gap < math.inf else 0.0
        before = now


def lost(lines: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the seconds, steps and joules that are lost if `lines` are reduced to the lines `kept`. If a removed line itself
    records lost seconds, steps or joules, these are included. Pure."""
    known = {id_of(line) for line in kept}
    dropped = [line for line in lines if id_of(line) not in known]
    totals = {name: sum(number(line, name) or 0.0 for line in dropped) for name in ("lost_seconds", "lost_steps", "lost_joules")}
    return {
        "lost_seconds": totals["lost_seconds"] + max(0.0, sum(took(lines)) - sum(took(kept))),
        "lost_steps": int(totals["lost_steps"]) + sum("train_loss" in line for line in dropped),
        "lost_joules": totals["lost_joules"] + sum(number(line, "energy_joules") or 0.0 for line in dropped),
    }


def id_of(line: Mapping[str, Any]) -> str:
    """Return a string that is equal for equal lines. Pure."""
    return json.dumps(line, sort_keys=True)


def _kind(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a key of a line. No two lines of a file have the same key."""
    return line["step"], line.get("event"), line.get("batch"), "val_loss" in line or "val_tokens" in line


def _belongs(line: bytes, step: int, next_batch: int) -> bool:
    with suppress(ValueError):
        record = parse_json(line, Line)
        return record["step"] <= step and record.get("batch", -1) < next_batch and record.get("event") != "end"
    return False

"""What a run did: timed phases, one JSON line a step, progress for people on rank 0."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from mpidp.metrics.tensorboard import Scalars
from mpidp.runtime.files import write_file

TAIL_BYTES = 1 << 16  # of a file in which the last lines of a rank that died are looked for


class MetricsFile:
    """RUN/metrics.jsonl: one JSON object a line, flushed at once, floats in full precision. Rank 0 alone has one."""

    def __init__(
        self, path: Path, step: int, next_batch: int, latest: Sequence[Mapping[str, Any]] | None = None,
        also: Scalars | None = None,
    ) -> None:
        """Lines of later steps and batches, which a resumed run will do again, and a half line are dropped. latest: this goes on
        in the place of one that may have lacked the time to write these, and did not write beyond."""
        self._path = path
        self.also: Scalars | None = None
        self.lost: dict[str, float] = {}  # what was spent on the lines that are dropped
        if latest is not None:
            self._mend(latest)
        elif path.exists():
            lines = path.read_bytes().split(b"\n")
            kept = [line for line in lines if _belongs(line, step, next_batch)]
            self.lost = lost(list(parsed(lines)), list(parsed(kept)))
            write_file(path, b"".join(line + b"\n" for line in kept))
        self._file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115
        self._late = b""  # what the disk had no room for
        self._said = False
        self.also = also

    def write(self, record: Mapping[str, Any]) -> None:
        """Numbers that are not finite become null, which every JSON reader takes."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        if self.also is not None:
            self.also.write(plain)
        self._late += json.dumps(plain, allow_nan=False).encode() + b"\n"
        try:
            while self._late:
                self._late = self._late[self._file.write(self._late) :]
        except OSError as error:  # a full disk does not stop the training
            if not self._said:
                print(f"warning: {self._path}: {error}. Its lines wait until there is room", file=sys.stderr, flush=True)
            self._said = True

    def _mend(self, latest: Sequence[Mapping[str, Any]]) -> None:
        """Take the end of the run and a half line away again, and put in what is missing of the latest lines."""
        with open(self._path, "rb+") as file:
            start = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
            file.seek(start)
            lines = file.read().splitlines(keepends=True)
            while lines and (not lines[-1].endswith(b"\n") or b'"event": "end"' in lines[-1]):
                lines.pop()
            file.truncate(start + sum(map(len, lines)))
        known = {_kind(json.loads(line)) for line in lines[bool(start) :]}
        self._file, self._late, self._said = open(self._path, "ab", buffering=0), b"", False  # noqa: SIM115
        for line in latest:
            if _kind(line) not in known:
                self.write(line)
        self._file.close()

    def close(self) -> None:
        """What found no room by now is lost."""
        with suppress(OSError):
            self._file.write(self._late)
            os.fsync(self._file.fileno())
        self._file.close()
        if self.also is not None:
            self.also.close()


def past(path: Path) -> tuple[int, float]:
    """(starts and recoveries after the first start, seconds of training) of which a run's file tells. Independent."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    failures = sum(line.get("event") in ("resume", "recovered") for line in lines)
    return failures, sum(line.get("step_seconds", 0.0) for line in lines)


def parsed(lines: Iterable[bytes | str]) -> Iterator[dict[str, Any]]:
    """The records among these lines; what is cut off or is none is left out. Pure."""
    for line in lines:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def number(line: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a line, or None. Pure."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def took(lines: Iterable[Mapping[str, Any]]) -> Iterator[float]:
    """Seconds of work since the line before, for each. Before a `start` no more counts than its process is old, and nothing that
    is counted as lost: the rest nobody worked. Lines without a time take none. Pure."""
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
    """What was spent on the lines that are not kept, and what was lost before already and is told in them. Pure."""
    known = {id_of(line) for line in kept}
    dropped = [line for line in lines if id_of(line) not in known]
    totals = {name: sum(number(line, name) or 0.0 for line in dropped) for name in ("lost_seconds", "lost_steps", "lost_joules")}
    return {
        "lost_seconds": totals["lost_seconds"] + max(0.0, sum(took(lines)) - sum(took(kept))),
        "lost_steps": int(totals["lost_steps"]) + sum("train_loss" in line for line in dropped),
        "lost_joules": totals["lost_joules"] + sum(number(line, "energy_joules") or 0.0 for line in dropped),
    }


def id_of(line: Mapping[str, Any]) -> str:
    """The line itself, to be looked up. Pure."""
    return json.dumps(line, sort_keys=True)


def _kind(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What there is one line of."""
    return line["step"], line.get("event"), line.get("batch"), "val_loss" in line


def _belongs(line: bytes, step: int, next_batch: int) -> bool:
    try:
        record = json.loads(line)
        return int(record["step"]) <= step and record.get("batch", -1) < next_batch and record.get("event") != "end"
    except (ValueError, KeyError, TypeError):
        return False

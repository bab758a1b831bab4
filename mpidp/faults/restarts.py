"""Limits the number of successive starts of a run from the same checkpoint. The file RUN/tries.json contains the number of
these starts, and the last error."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

from mpidp.errors import MpidpError, Stopped, UsageError
from mpidp.runtime.files import write_file
from mpidp.runtime.json_file import read_json


class _Record(TypedDict):
    step: int
    tries: int
    words: str


class RestartLog:
    """Counts successive starts from the same checkpoint. Independent."""

    def __init__(self, run_dir: Path, begun: bool = False) -> None:
        """`begun`: True in a process that joins a running job, because the start of this job is already counted."""
        self.path, self._begun = run_dir / "tries.json", begun
        self._before: dict[str, Any] | None = None  # on rank 0: the content of the file before this start

    def begin(self, step: int, most: int, rank: int) -> None:
        """On rank 0, count a start from the checkpoint of `step`, or from the beginning if `step` is -1. Raises UsageError on
        rank 0 if at least `most` starts from this checkpoint were counted before."""
        self._begun = True
        if rank:
            return
        record = self._before = self._read()
        tries = int(record["tries"]) if record.get("step") == step else 0
        if tries >= most:
            self._begun = False
            where = f"the checkpoint of step {step}" if step >= 0 else "the beginning"
            raise UsageError(
                f"the run was started {tries} times in a row from {where}, and never wrote another checkpoint. "
                + (f"The last error was: {record['words']}. " if record["words"] else
                   "The last start left no error message: it was killed, perhaps for lack of memory, by a node failure, or at a "
                   "time limit. ")
                + f"When the cause is fixed, remove {self.path}, or allow more starts with --run.tries={tries + 1}"
            )
        self._write({"step": step, "tries": tries + 1, "words": ""})

    def failed(self, message: str) -> None:
        """Record the error message of this start."""
        self._write(self._read() | {"words": message[:2000]})

    def ended(self, error: BaseException | None, rank: int) -> None:
        """Record how this start ended. `error`: the exception that ended the job, or None. If there is no error, or the job was
        stopped on request, rank 0 removes the file. If all ranks have the same UsageError, the start was refused, so rank 0 does
        not count it. If all ranks have the same other error, rank 0 records it. Otherwise each rank with an error records its own
        error."""
        if not self._begun:
            return
        everywhere = isinstance(error, MpidpError) and error.everywhere
        if error is None or isinstance(error, (Stopped, KeyboardInterrupt)):
            if rank == 0:
                self.path.unlink(missing_ok=True)
        elif everywhere and isinstance(error, UsageError):
            if self._before:
                self._write(self._before)
            elif self._before is not None:
                self.path.unlink(missing_ok=True)
        elif rank == 0 or not everywhere:
            kind = "" if isinstance(error, MpidpError) else f"{type(error).__name__}: "
            self.failed(("" if everywhere else f"rank {rank}: ") + kind + str(error))

    def _read(self) -> dict[str, Any]:
        try:
            return dict(read_json(self.path, _Record))
        except (OSError, ValueError):
            return {}

    def _write(self, record: dict[str, Any]) -> None:
        with suppress(OSError):  # a full disk must not stop the run
            write_file(self.path, json.dumps(record).encode())

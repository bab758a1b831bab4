"""A run that starts again and again and gets nowhere is not started once more: RUN/tries.json counts, and says why."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpidp.errors import MpidpError, Stopped, UsageError
from mpidp.runtime.files import write_file


class RestartLog:
    """Starts in a row from the same checkpoint that did not end well. Independent."""

    def __init__(self, run_dir: Path, begun: bool = False) -> None:
        """begun: this process joins a start that is counted already."""
        self.path, self._begun = run_dir / "tries.json", begun

    def begin(self, step: int, most: int, rank: int) -> None:
        """A start from the checkpoint of this step; -1: from the beginning. UsageError on rank 0 after `most` of them."""
        self._begun = True
        if rank:
            return
        told = self._read()
        tries = int(told["tries"]) if told.get("step") == step else 0
        if tries >= most:
            self._begun = False
            where = f"the checkpoint of step {step}" if step >= 0 else "the beginning"
            raise UsageError(
                f"{tries} starts in a row from {where} ended without another checkpoint. The last one "
                + (f"said: {told['words']}. " if told["words"] else "left no word: it was killed (memory? a node? the time?). ")
                + f"When that is mended, remove {self.path}, or allow more with --run.tries={tries + 1}"
            )
        self._write({"step": step, "tries": tries + 1, "words": ""})

    def failed(self, words: str) -> None:
        """The last words of this start."""
        self._write(self._read() | {"words": words[:2000]})

    def ended(self, error: BaseException | None, rank: int) -> None:
        """What came of it, on the rank that knows: rank 0, and any that fails alone."""
        if not self._begun:
            return
        everywhere = isinstance(error, MpidpError) and error.everywhere
        if error is None or isinstance(error, (Stopped, KeyboardInterrupt)):
            if rank == 0:
                self.path.unlink(missing_ok=True)
        elif rank == 0 or not everywhere:
            kind = "" if isinstance(error, MpidpError) else f"{type(error).__name__}: "
            self.failed(("" if everywhere else f"rank {rank}: ") + kind + str(error))

    def _read(self) -> dict[str, Any]:
        try:
            told = json.loads(self.path.read_text())
            return {"step": int(told["step"]), "tries": int(told["tries"]), "words": str(told["words"])}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _write(self, told: dict[str, Any]) -> None:
        with suppress(OSError):  # a full disk must not stop a run that needs none
            write_file(self.path, json.dumps(told).encode())

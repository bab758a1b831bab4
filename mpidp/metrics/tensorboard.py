"""Writes the numbers of metrics.jsonl to RUN/tensorboard, with torch's SummaryWriter."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpidp.errors import UsageError

LEFT_OUT = ("step", "unix_seconds")


def check_tensorboard(wanted: bool) -> None:
    """Raise UsageError if TensorBoard is wanted but not installed. Independent."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "metrics.tensorboard=true, but the package tensorboard is not installed: pip install 'mpidp[tensorboard]', or set it "
            "to false (metrics.jsonl has the same numbers)"
        )


class Scalars:
    """Writes the scalars of a run for TensorBoard, on rank 0. Independent."""

    def __init__(self, folder: Path, step: int) -> None:
        """step: the last step before this job. TensorBoard hides later steps that an earlier job wrote."""
        from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined]

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, line: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl at its step. Each number becomes the scalar steps/NAME, or val/NAME in the line of an
        evaluation. An event becomes text."""
        if "event" in line:
            self._writer.add_text("events", f"step {line['step']}: {line['event']}", int(line["step"]))
            return
        group = "val" if "val_loss" in line else "steps"
        for name, value in line.items():
            if name not in LEFT_OUT and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(f"{group}/{name}", value, int(line["step"]))

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()

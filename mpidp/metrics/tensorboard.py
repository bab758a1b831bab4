"""The figures of metrics.jsonl for TensorBoard, by torch's own writer: RUN/tensorboard."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpidp.errors import UsageError

LEFT_OUT = ("step", "unix_seconds")


def check_tensorboard(wanted: bool) -> None:
    """UsageError when it is wanted and not here. Independent."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "metrics.tensorboard=true, but the package tensorboard is not here: pip install 'mpidp[tensorboard]' (or tensorboard "
            "itself), or leave it false: metrics.jsonl has the same figures"
        )


class Scalars:
    """A writer of one run. Rank 0 alone has one. Independent."""

    def __init__(self, folder: Path, step: int) -> None:
        """step: after which it goes on; what an earlier job wrote of later ones is hidden."""
        from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined]

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, line: Mapping[str, Any]) -> None:
        """Each number of a line under its name, at the line's step: steps/NAME, and val/NAME of an evaluation; events as text."""
        if "event" in line:
            self._writer.add_text("events", f"step {line['step']}: {line['event']}", int(line["step"]))
            return
        group = "val" if "val_loss" in line else "steps"
        for name, value in line.items():
            if name not in LEFT_OUT and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(f"{group}/{name}", value, int(line["step"]))

    def close(self) -> None:
        """What was written is on the disk."""
        self._writer.close()

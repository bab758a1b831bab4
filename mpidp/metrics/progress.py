"""Prints the progress of training on rank 0."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from mpidp.runtime.environment import launched_size

PEAK_FLOPS = {  # a word in the device's name -> dense bf16 FLOP/s, from the manufacturers' datasheets
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return the peak FLOP/s of a device in bf16, or None if the device is unknown. MFU (model FLOPs utilization) needs this
    number."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


class Progress:
    """Prints the progress, at most every three seconds. On a terminal, it updates one line. Otherwise, it prints new lines.
    Independent."""

    def __init__(self, total_steps: int, active: bool) -> None:
        self.total_steps, self.active = total_steps, active
        self._last, self._tokens = 0.0, 0  # time of the last output, tokens of the last record
        self._began = time.perf_counter()
        self._first_step: int | None = None
        self._status: Any = None
        if active and sys.stdout.isatty() and not launched_size():  # Open MPI gives each rank its own terminal
            from rich.console import Console

            self._status = Console().status("starting")
            self._status.start()

    def print(self, text: str) -> None:
        if self.active:
            print(text, flush=True)

    def step(self, record: Mapping[str, Any]) -> None:
        """Print the record of a step. Do nothing if the last output is less than three seconds old, unless this is the last
        step."""
        step = int(record["step"])
        where = "" if record["tokens"] > self._tokens else " on rank 0"  # tokens grow only at steps that synchronize all ranks
        self._tokens = record["tokens"]
        now = time.perf_counter()
        if self._first_step is None:
            self._first_step, self._began = step, now
        last = step == self.total_steps
        if not self.active or (now - self._last < 3.0 and not last):
            return
        self._last = now
        done = step - self._first_step
        eta = (now - self._began) / done * (self.total_steps - step) if done else 0.0
        mfu = f"  mfu {100 * record['mfu']:.1f}%" if record.get("mfu") is not None else ""
        text = (
            f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  loss {record['train_loss']:.4f}  "
            f"lr {record['lr']:.2e}  norm {record['grad_norm']:.2f}  {record['tokens_per_second']:,.0f} tokens/s{where}{mfu}  "
            f"eta {int(eta) // 60}:{int(eta) % 60:02d}"
        )
        if self._status is not None:
            self._status.update(text)
        if self._status is None or last:
            print(text, flush=True)

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()

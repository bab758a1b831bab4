"""Joules by the counters of the machine: CPUs by RAPL (Linux's powercap), GPUs by NVML. Where there is no counter, or no
permission to read it, there is no figure: nothing is guessed.

One rank of a machine reads for all of it: whole CPU packages with their memory, whoever uses them, and each GPU of the job once.
What it read goes to the others with the board of the next step (step.py), so that measuring costs no message.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
EACH_SECONDS = 0.2  # that counters are read, at most
SELDOM_SECONDS = 30.0  # and at least, by a thread: RAPL's begin anew after some 260 kJ, a quarter of an hour
Counter = Callable[[], float]  # J since it was last read; OSError


class Zone:
    """A RAPL counter: microjoules that begin anew beyond a largest value."""

    def __init__(self, folder: Path) -> None:
        """OSError, ValueError where it cannot be read."""
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._before = int(self._file.read_text())

    def __call__(self) -> float:
        now = int(self._file.read_text())
        used = now - self._before if now >= self._before else now - self._before + self._range + 1
        self._before = now
        return used / 1e6


class Gpu:
    """A GPU's counter: millijoules since the driver was loaded."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        """nvml: the module pynvml, or alike. Its error where the GPU has none (before Volta; a part of a GPU)."""
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._before = int(nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def __call__(self) -> float:
        now = int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        used, self._before = now - self._before, now
        return used / 1e3


def zones(root: Path = POWERCAP) -> tuple[list[Zone], str]:
    """(counters of all packages and their memory, why there is none). Cores and uncore are parts of a package, psys and mmio
    tell of the same once more: not counted. Independent."""
    found: list[Zone] = []
    folders = []
    for folder in sorted(root.glob("intel-rapl:*")):  # AMD's, too
        with suppress(OSError):
            name = (folder / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                folders.append(folder)
    try:
        found = [Zone(folder) for folder in folders]
    except PermissionError:
        return [], f"no permission to read {root}/*/energy_uj (an administrator can grant it)"
    except (OSError, ValueError) as error:
        return [], f"{root}: {error}"
    return found, "" if found else f"no RAPL counter in {root}"


def gpus(uuids: Sequence[str]) -> tuple[list[Gpu], str]:
    """(counters of these GPUs, why they are not there): all or none. Independent."""
    if not uuids:
        return [], ""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [Gpu(pynvml, uuid) for uuid in uuids], ""
    except ImportError:
        return [], "the package nvidia-ml-py is not here (pip install 'mpidp[energy]')"
    except Exception as error:  # NVML's own, of many kinds
        return [], f"NVML: {error}"


class Meter:
    """What this rank's machine used, if this rank reads its counters. Independent."""

    def __init__(self, counters: Sequence[Counter] = ()) -> None:
        self._counters, self._lock, self._joules = list(counters), threading.Lock(), 0.0
        self._read, self._stop = time.monotonic(), threading.Event()
        if self._counters:
            threading.Thread(target=self._seldom, name="energy", daemon=True).start()

    def pop_joules(self, now: bool = False) -> float:
        """J since this was last called, as far as counters were read; now: and they are."""
        if not self._counters:
            return 0.0
        with self._lock:
            if now or time.monotonic() - self._read > EACH_SECONDS:
                self._look()
            taken, self._joules = self._joules, 0.0
            return taken

    def close(self) -> None:
        """No thread reads any more."""
        self._stop.set()

    def _look(self) -> None:
        self._read = time.monotonic()
        for counter in self._counters:
            with suppress(Exception):  # a device that fell off the bus; the next read may tell all
                self._joules += counter()

    def _seldom(self) -> None:
        while not self._stop.wait(SELDOM_SECONDS):
            with self._lock:
                if time.monotonic() - self._read > SELDOM_SECONDS:
                    self._look()


def open_meter(wanted: bool, reads: bool, uuids: Sequence[str], root: Path = POWERCAP) -> tuple[Meter, dict[str, str]]:
    """(this rank's meter, what it has or lacks in words: cpu, gpu). reads: for its machine, whose GPUs of the job have these
    uuids; other ranks say nothing. Independent."""
    if not wanted or not reads:
        return Meter(), {}
    cpu, no_cpu = zones(root)
    gpu, no_gpu = gpus(uuids)
    said = {"cpu": no_cpu or "RAPL", **({"gpu": no_gpu or "NVML"} if uuids else {})}
    return Meter([*cpu, *gpu]), said


def common_counters(said: Sequence[dict[str, str]]) -> tuple[list[str], str]:
    """(what all machines measure of cpu and gpu, why not more), from what each said. Only what all have sums up. Pure."""
    told = [one for one in said if one]
    measured = [part for part, by in (("cpu", "RAPL"), ("gpu", "NVML"))
                if any(part in one for one in told) and all(one.get(part, by) == by for one in told)]
    reasons = dict.fromkeys(
        why for one in told for part, why in one.items() if part not in measured and why not in ("RAPL", "NVML")
    )
    return measured, "; ".join(reasons) or ("" if told else "metrics.energy=false")

"""Measures energy in joules with hardware counters: RAPL (Linux powercap) for CPUs, and NVML for GPUs. If a counter is missing or
cannot be read, no value is reported. Values are never estimated.

One rank per machine reads the counters. A CPU counter covers a whole CPU package and its memory, so it includes the energy used
by other processes. The energy of each GPU of the job is counted once. The values are sent together with the other metrics of the
next step, without an additional message.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
EACH_SECONDS = 0.2  # minimum time between two readings of the counters
SELDOM_SECONDS = 30.0  # a thread ensures this maximum time between readings, because RAPL counters wrap around after 260 kJ
Counter = Callable[[], float]  # returns the joules used since its last call; raises OSError if the counter cannot be read


class Zone:
    """A RAPL counter in microjoules. After its maximum value, it starts again at 0."""

    def __init__(self, folder: Path) -> None:
        """folder: the counter's folder in powercap. Raises OSError or ValueError if the counter cannot be read."""
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._before = int(self._file.read_text())

    def __call__(self) -> float:
        now = int(self._file.read_text())
        used = now - self._before if now >= self._before else now - self._before + self._range + 1
        self._before = now
        return used / 1e6


class Gpu:
    """The energy counter of a GPU, in millijoules since the driver was loaded."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        """nvml: the module pynvml. Raises NVMLError if the GPU has no counter. GPUs older than Volta and MIG instances have
        none."""
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._before = int(nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def __call__(self) -> float:
        now = int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        used, self._before = now - self._before, now
        return used / 1e3


def zones(root: Path = POWERCAP) -> tuple[list[Zone], str]:
    """Return (counters of all packages and their memory, the reason if there are none). The counters of cores, uncore and mmio
    are skipped, because a package's counter includes their energy. psys is skipped, because it includes the packages.
    Independent."""
    found: list[Zone] = []
    folders = []
    for folder in sorted(root.glob("intel-rapl:*")):  # AMD CPUs use this name, too
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
    """Return (counters of these GPUs, ""), or ([], the reason) if a GPU has no readable counter. Independent."""
    if not uuids:
        return [], ""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [Gpu(pynvml, uuid) for uuid in uuids], ""
    except ImportError:
        return [], "the package nvidia-ml-py is not installed (pip install 'mpidp[energy]')"
    except Exception as error:  # NVML raises many kinds of errors
        return [], f"NVML: {error}"


class Meter:
    """Sums the energy that this rank's machine uses, if this rank reads the counters. Independent."""

    def __init__(self, counters: Sequence[Counter] = ()) -> None:
        self._counters, self._lock, self._joules = list(counters), threading.Lock(), 0.0
        self._read, self._stop = time.monotonic(), threading.Event()
        if self._counters:
            threading.Thread(target=self._seldom, name="energy", daemon=True).start()

    def pop_joules(self, now: bool = False) -> float:
        """Return the joules measured since the last call. now: whether to read the counters even if the last reading is
        recent."""
        if not self._counters:
            return 0.0
        with self._lock:
            if now or time.monotonic() - self._read > EACH_SECONDS:
                self._read_counters()
            taken, self._joules = self._joules, 0.0
            return taken

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()

    def _read_counters(self) -> None:
        self._read = time.monotonic()
        for counter in self._counters:
            with suppress(Exception):  # for example if a device is lost; the next reading may include the energy
                self._joules += counter()

    def _seldom(self) -> None:
        while not self._stop.wait(SELDOM_SECONDS):
            with self._lock:
                if time.monotonic() - self._read > SELDOM_SECONDS:
                    self._read_counters()


def open_meter(wanted: bool, reads: bool, uuids: Sequence[str], root: Path = POWERCAP) -> tuple[Meter, dict[str, str]]:
    """Return this rank's meter and the status of its counters: {"cpu": "RAPL", "gpu": "NVML"}. If a counter is missing, the
    status has the reason instead of the counter's name.

    wanted: metrics.energy. reads: whether this rank reads the counters of its machine. On other ranks the status is empty. uuids:
    the job's GPUs on this machine. root: folder of the RAPL counters. Independent."""
    if not wanted or not reads:
        return Meter(), {}
    cpu, no_cpu = zones(root)
    gpu, no_gpu = gpus(uuids)
    status = {"cpu": no_cpu or "RAPL", **({"gpu": no_gpu or "NVML"} if uuids else {})}
    return Meter([*cpu, *gpu]), status


def common_counters(statuses: Sequence[dict[str, str]]) -> tuple[list[str], str]:
    """Return the list of what all machines measure ("cpu", "gpu" or both), and the reasons why other counters are missing.
    statuses: the statuses that open_meter() returned on all ranks. Pure."""
    machines = [one for one in statuses if one]
    measured = [part for part, by in (("cpu", "RAPL"), ("gpu", "NVML"))
                if any(part in one for one in machines) and all(one.get(part, by) == by for one in machines)]
    reasons = dict.fromkeys(
        why for one in machines for part, why in one.items() if part not in measured and why not in ("RAPL", "NVML")
    )
    return measured, "; ".join(reasons) or ("" if machines else "metrics.energy=false")

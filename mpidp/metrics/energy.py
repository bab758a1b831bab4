"""Measures energy in joules with hardware counters: RAPL (Linux powercap) for CPUs, and NVML for GPUs. If a counter is missing
or cannot be read, no value is reported.

One rank per machine reads the counters. A CPU counter covers a whole CPU package and its memory, so it includes the energy used
by other processes. The energy of each GPU of the job is counted once.
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
    """A RAPL counter, in microjoules. A call returns the joules used since the last call."""

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
    """The energy counter of a GPU. A call returns the joules used since the last call."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        """nvml: the module pynvml. Raises NVMLError if the GPU has no counter, for example if it is older than Volta or a MIG
        instance."""
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._before = int(nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def __call__(self) -> float:
        now = int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        used, self._before = now - self._before, now
        return used / 1e3


def zones(root: Path = POWERCAP) -> tuple[list[Zone], str]:
    """Return (counters, why). counters: the counters of all CPU packages and their memory. why: the reason if there are no
    counters, else "". root: the folder of the RAPL counters. Counters of cores, uncore and psys are skipped, because they
    measure the same energy. Independent."""
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
    """Return (counters of these GPUs, ""). If one of these GPUs has no readable counter, return ([], the reason). Independent."""
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
    """Sums the energy that the counters of this rank's machine measure. On a rank that reads no counters, the sum is 0.
    Independent."""

    def __init__(self, counters: Sequence[Counter] = ()) -> None:
        self._counters, self._lock, self._joules = list(counters), threading.Lock(), 0.0
        self._read, self._stop = time.monotonic(), threading.Event()
        if self._counters:
            threading.Thread(target=self._seldom, name="energy", daemon=True).start()

    def pop_joules(self, now: bool = False) -> float:
        """Return the joules measured since the last call. now: whether to read the counters even if they were read less than
        EACH_SECONDS ago."""
        if not self._counters:
            return 0.0
        with self._lock:
            if now or time.monotonic() - self._read > EACH_SECONDS:
                self._read_counters()
            taken, self._joules = self._joules, 0.0
            return taken

    def close(self) -> None:
        """Stop the thread that reads the counters from time to time."""
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
    """Return (meter, status). status: {"cpu": "RAPL", "gpu": "NVML"}. If the counter of a part is missing, the value is the
    reason.

    wanted: metrics.energy. reads: whether this rank reads the counters of its machine. If it does not, `status` is empty. uuids:
    the job's GPUs on this machine. root: the folder of the RAPL counters. Independent.
    """
    if not wanted or not reads:
        return Meter(), {}
    cpu, no_cpu = zones(root)
    gpu, no_gpu = gpus(uuids)
    status = {"cpu": no_cpu or "RAPL", **({"gpu": no_gpu or "NVML"} if uuids else {})}
    return Meter([*cpu, *gpu]), status


def common_counters(statuses: Sequence[dict[str, str]]) -> tuple[list[str], str]:
    """Return (measured, why). measured: the parts ("cpu", "gpu" or both) that are measured on all machines that have them.
    why: the reasons why other parts are not measured on all machines. statuses: the statuses that open_meter() returned on all
    ranks. Pure."""
    machines = [one for one in statuses if one]
    measured = [part for part, by in (("cpu", "RAPL"), ("gpu", "NVML"))
                if any(part in one for one in machines) and all(one.get(part, by) == by for one in machines)]
    reasons = dict.fromkeys(
        why for one in machines for part, why in one.items() if part not in measured and why not in ("RAPL", "NVML")
    )
    return measured, "; ".join(reasons) or ("" if machines else "metrics.energy=false")

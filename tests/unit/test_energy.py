"""Laws of energy: a counter that wraps around loses nothing, nothing is counted twice, and without a counter no energy is
reported."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mpidp.metrics.energy import Meter, Zone, common_counters, open_meter, zones

RANGE = 1_000_000


def zone(root: Path, name: str, says: str, microjoules: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(says + "\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return folder


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """A powercap folder with two packages and the memory of one; parts of packages and duplicates must not count twice."""
    zone(tmp_path, "intel-rapl:0", "package-0", 100)
    zone(tmp_path, "intel-rapl:0:0", "core", 5000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 999_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 0)
    zone(tmp_path, "intel-rapl:2", "psys", 7000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 100)
    return tmp_path


def add(folder: Path, microjoules: int) -> None:
    """Add microjoules as the kernel does: beyond its range the counter restarts."""
    now = int((folder / "energy_uj").read_text()) + microjoules
    (folder / "energy_uj").write_text(str(now % (RANGE + 1)))


def test_packages_and_memory_are_counted_once(powercap: Path) -> None:
    meter, said = open_meter(True, True, [], powercap)
    for folder in powercap.iterdir():
        add(folder, 500_000)  # the memory's counter wraps around
    assert meter.pop_joules(now=True) == pytest.approx(3 * 0.5) and said == {"cpu": "RAPL"}
    assert meter.pop_joules(now=True) == 0.0
    for folder in powercap.iterdir():
        add(folder, RANGE)
    assert meter.pop_joules(now=True) == pytest.approx(3.0)
    meter.close()


def test_a_counter_that_begins_anew_loses_nothing(tmp_path: Path) -> None:
    counter = Zone(folder := zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 3))
    taken = 0.0
    for used in (0, 1, 2, 1, RANGE, 400_000, 700_000):
        add(folder, used)
        taken += counter()
    assert taken == pytest.approx((4 + RANGE + 1_100_000) / 1e6)


def test_ranks_that_do_not_read_and_runs_that_do_not_want_to(powercap: Path) -> None:
    for wanted, reads in ((True, False), (False, True)):
        meter, said = open_meter(wanted, reads, [], powercap)
        for folder in powercap.iterdir():
            add(folder, 10)
        assert meter.pop_joules(now=True) == 0.0 and said == {}


def test_it_is_read_seldom_and_nothing_is_lost_by_that() -> None:
    read: list[float] = []

    def counter() -> float:
        read.append(1.0)
        return 1.0

    meter = Meter([counter])
    taken = sum(meter.pop_joules() for _ in range(1000))
    assert len(read) < 100 and taken + meter.pop_joules(now=True) == len(read)
    meter.close()


def test_without_counters_there_is_a_reason(tmp_path: Path, powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert zones(tmp_path / "none") == ([], f"no RAPL counter in {tmp_path / 'none'}")
    real = Path.read_text

    def forbidden(self: Path, *args: Any, **kwargs: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", forbidden)
    found, why = zones(powercap)
    assert found == [] and "no permission to read" in why and str(powercap) in why
    meter, said = open_meter(True, True, [], powercap)
    assert meter.pop_joules(now=True) == 0.0 and said["cpu"] == why


class Nvml(types.ModuleType):
    """Simulates NVML with two GPUs."""

    joules = {"GPU-a": 10.0, "GPU-b": 20.0}

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.joules:
            raise RuntimeError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return int(1000 * self.joules[handle])


def test_gpus_are_counted_by_their_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(nvml, "joules", dict(nvml.joules), raising=False)
    meter, said = open_meter(True, True, ["GPU-a"], tmp_path)
    nvml.joules["GPU-a"] += 3.5
    nvml.joules["GPU-b"] += 100.0  # the GPU of another job
    assert meter.pop_joules(now=True) == pytest.approx(3.5) and said["gpu"] == "NVML"
    meter.close()
    meter, said = open_meter(True, True, ["GPU-a", "GPU-x"], tmp_path)
    assert meter.pop_joules(now=True) == 0.0 and said["gpu"] == "NVML: Not Found"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in open_meter(True, True, ["GPU-a"], tmp_path)[1]["gpu"]


@pytest.mark.parametrize(("said", "measured", "why"), [
    ([{"cpu": "RAPL"}, {}, {"cpu": "RAPL"}], ["cpu"], ""), ([{}, {}], [], "metrics.energy=false"),
    ([{"cpu": "RAPL"}, {"cpu": "no RAPL counter"}], [], "no RAPL counter"),
    ([{"cpu": "no", "gpu": "NVML"}, {"cpu": "no", "gpu": "NVML"}], ["gpu"], "no"),
    ([{"cpu": "RAPL", "gpu": "NVML"}], ["cpu", "gpu"], ""), ([{"cpu": "RAPL", "gpu": "NVML: x"}], ["cpu"], "NVML: x"),
])  # fmt: skip
def test_only_what_all_machines_measure_is_told(said: list[dict[str, str]], measured: list[str], why: str) -> None:
    assert common_counters(said) == (measured, why)


def test_this_machine_has_counters_or_a_reason() -> None:
    found, why = zones()
    assert bool(found) != bool(why) or (os.path.isdir("/sys/class/powercap") and found)

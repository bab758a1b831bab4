"""Folders: are shards and run there on every node, how fast are they read, do locks lock, is there room for checkpoints?"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mpidp.checkup.findings import Finding, size, where
from mpidp.config.command_line import read_toml
from mpidp.config.settings import Run
from mpidp.errors import UsageError

CHUNK = 4 << 20
SLOW_READ = 50e6  # bytes/s a rank: far more than training reads, so a slower one points at trouble
LOCKS = {"flock": fcntl.flock, "fcntl": fcntl.lockf}
PROBE = ".doctor.lock"
_CHILD = "import sys; from mpidp.checkup.storage import *; print(refused(Path(sys.argv[1])))"


@dataclass(frozen=True)
class Read:
    """What one rank read of the shards."""

    host: str
    bytes: int = 0
    seconds: float = 0.0
    problem: str = ""


def read(folder: Path, host: str, rank: int, ranks: int, seconds: float) -> Read:
    """This rank's part of the shards, for so long at most, past what the kernel remembers of them. Independent."""
    files = sorted(folder.glob("*.h5"))
    if not (folder / "index.json").is_file() or not files:
        return Read(host, problem=f"{folder} holds no index.json and *.h5")
    try:
        with open(files[rank % len(files)], "rb", buffering=0) as file:
            part = os.fstat(file.fileno()).st_size // -(-ranks // len(files))
            start, done, began = rank // len(files) * part, 0, time.perf_counter()
            os.posix_fadvise(file.fileno(), start, part, os.POSIX_FADV_DONTNEED)
            file.seek(start)
            while time.perf_counter() - began < seconds and (got := len(file.read(min(CHUNK, part - done)))):
                done += got
    except OSError as error:
        return Read(host, problem=str(error))
    return Read(host, done, time.perf_counter() - began)


def speed(found: Sequence[Read]) -> float | None:
    """Bytes a second of all ranks together; None when nothing was read. Pure."""
    longest = max((one.seconds for one in found), default=0.0)
    return sum(one.bytes for one in found) / longest if longest else None


def check_read(found: Sequence[Read], folder: str) -> Finding:
    """Of --data. Pure."""
    without = [(rank, one.host) for rank, one in enumerate(found) if one.problem]
    if without:
        words = f"{found[without[0][0]].problem} ({where(without)})"
        fix = "prepare it (python -m data_tools.prepare), in a folder that all nodes see, or a copy on each"
        return Finding("data", "wrong", words, fix)
    slowest = min(found, key=lambda one: one.bytes / (one.seconds or 1e-9))
    slow = slowest.bytes / (slowest.seconds or 1e-9)
    total = size(sum(one.bytes for one in found))
    words = f"{folder}: {(speed(found) or 0.0) / 1e6:,.0f} MB/s, {total} read by {len(found)} together"
    if slow < SLOW_READ and slowest.bytes > CHUNK:
        fix = "copy the shards to a disk of the node, or stripe them (lfs setstripe -c 8 on Lustre)"
        return Finding("data", "warning", f"{words}; a rank on {slowest.host} only {slow / 1e6:,.0f} MB/s", fix)
    return Finding("data", "ok", words)


def hold(folder: Path) -> int | Finding:
    """Make a file in run.dir, locked in every way that works there. Independent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / PROBE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        return Finding("run.dir", "wrong", f"nothing can be written there: {error}", "choose another with --run.dir=DIR")
    for lock in LOCKS.values():
        with suppress(OSError):  # others will tell
            lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def refused(folder: Path) -> dict[str, bool | str] | Finding:
    """For each kind of lock: does somebody else hold it? Or why there is none. Independent."""
    found: dict[str, bool | str] = {}
    for name, lock in LOCKS.items():
        try:
            with open(folder / PROBE, "r+b") as file:
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found[name] = False
        except FileNotFoundError as error:
            return Finding("run.dir", "wrong", f"what rank 0 wrote there is not seen by all: {error}", "take a shared folder")
        except OSError as error:
            found[name] = isinstance(error, BlockingIOError) or str(error)
    return found


def refused_to_a_child(folder: Path) -> dict[str, bool | str]:
    """The same by another process, for a rank that is alone. Independent."""
    child = subprocess.run([sys.executable, "-c", _CHILD, str(folder)], capture_output=True, text=True, timeout=60, check=False)
    return {name: f"'{name}': True" in child.stdout for name in LOCKS}


def check_locks(met: Sequence[Mapping[str, bool | str]]) -> Finding:
    """Do locks in run.dir keep others out? Pure."""
    bad = {name: next((one[name] for one in met if one[name] is not True), True) for name in LOCKS}
    if all(answer is True for answer in bad.values()):
        return Finding("locks", "ok", f"flock and fcntl keep others out ({len(met)} tried)")
    said: dict[bool | str, str] = {True: "works", False: "does not keep others out"}
    words = "; ".join(f"{name}: {said.get(answer, str(answer))}" for name, answer in bad.items())
    fix = "mount Lustre with -o flock, or keep runs on another file system"
    return Finding("locks", "warning", f"{words}. Two jobs in one run.dir are told apart by the words in RUN/lock alone", fix)


def check_room(folder: Path) -> Finding:
    """Free space against the checkpoints that will be there at once (run.keep, and one that is being written). Independent."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    told, keep = os.statvfs(there), Run.keep
    free, words = told.f_bavail * told.f_frsize, f"{folder}: {size(told.f_bavail * told.f_frsize)} free"
    sizes = [sum(f.stat().st_size for f in step.iterdir()) for step in folder.glob("checkpoints/step_*")]
    if not sizes:
        return Finding("room", "ok" if free > 1 << 30 else "note", f"{words}; no checkpoint there yet says how much one takes")
    with suppress(UsageError, ValueError):
        keep = int(read_toml(folder / "config.toml").get("run.keep", keep))
    needed = max(sizes) * (keep + 1 - min(keep, len(sizes)))
    words += f", {size(needed)} more will be needed ({size(max(sizes))} a checkpoint, {keep} kept and one being written)"
    verdict = "wrong" if free < needed else "warning" if free < 2 * needed else "ok"
    return Finding("room", verdict, words, "" if verdict == "ok" else "make room, lower run.keep, or choose another run.dir")

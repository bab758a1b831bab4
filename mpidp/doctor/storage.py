"""Checks folders: whether all nodes see the shards and run.dir, how fast reads are, whether locks work, and whether there is
enough space."""

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

from mpidp.config.command_line import read_toml
from mpidp.config.settings import RunSettings
from mpidp.doctor.findings import CheckResult, size, where
from mpidp.errors import UsageError

CHUNK = 4 << 20  # bytes per read
SLOW_READ = 50e6  # bytes/s per rank; training needs far less, so a lower speed indicates a problem
LOCKS = {"flock": fcntl.flock, "fcntl": fcntl.lockf}
PROBE = ".doctor.lock"
_CHILD = "import sys; from mpidp.doctor.storage import *; print(lock_states(Path(sys.argv[1])))"


@dataclass(frozen=True)
class ReadTest:
    """The result of one rank's test read of the shards."""

    host: str
    bytes: int = 0  # number of bytes read
    seconds: float = 0.0
    problem: str = ""  # error message, if nothing was read


def read(folder: Path, host: str, rank: int, ranks: int, seconds: float) -> ReadTest:
    """Read a part of a shard (HDF5 file) in `folder` for at most `seconds` seconds, without the page cache. Each rank reads a
    different part. `ranks`: the number of ranks. Independent."""
    files = sorted(folder.glob("*.h5"))
    if not (folder / "index.json").is_file() or not files:
        return ReadTest(host, problem=f"{folder} has no index.json with *.h5 files")
    try:
        with open(files[rank % len(files)], "rb", buffering=0) as file:
            part = os.fstat(file.fileno()).st_size // -(-ranks // len(files))
            start, done, began = rank // len(files) * part, 0, time.perf_counter()
            os.posix_fadvise(file.fileno(), start, part, os.POSIX_FADV_DONTNEED)
            file.seek(start)
            while time.perf_counter() - began < seconds and (got := len(file.read(min(CHUNK, part - done)))):
                done += got
    except OSError as error:
        return ReadTest(host, problem=str(error))
    return ReadTest(host, done, time.perf_counter() - began)


def speed(found: Sequence[ReadTest]) -> float | None:
    """Return the bytes per second that all ranks read together, or None if nothing was read. Pure."""
    longest = max((one.seconds for one in found), default=0.0)
    return sum(one.bytes for one in found) / longest if longest else None


def check_read(found: Sequence[ReadTest], folder: str) -> CheckResult:
    """Report whether all ranks could read `folder`, the value of --data, and how fast. Pure."""
    without = [(rank, one.host) for rank, one in enumerate(found) if one.problem]
    if without:
        words = f"{found[without[0][0]].problem} ({where(without)})"
        fix = "prepare shards (python -m data_tools.prepare) in a folder that all nodes share, or copy them to each node"
        return CheckResult("data", "wrong", words, fix)
    slowest = min(found, key=lambda one: one.bytes / (one.seconds or 1e-9))
    slow = slowest.bytes / (slowest.seconds or 1e-9)
    total = size(sum(one.bytes for one in found))
    words = f"{folder}: {(speed(found) or 0.0) / 1e6:,.0f} MB/s, {total} read by {len(found)} rank{'s' * (len(found) > 1)}"
    if slow < SLOW_READ and slowest.bytes > CHUNK:
        fix = "copy the shards to a local disk, or stripe them (lfs setstripe -c 8 on Lustre)"
        return CheckResult("data", "warning", f"{words}; a rank on {slowest.host} reads only {slow / 1e6:,.0f} MB/s", fix)
    return CheckResult("data", "ok", words)


def make_locked_file(folder: Path) -> int | CheckResult:
    """Create a file in `folder` (run.dir), acquire each kind of lock on the file, and return its file descriptor. Kinds of
    locks that do not work there are skipped. If the file cannot be created, return a CheckResult. Independent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / PROBE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        return CheckResult("run.dir", "wrong", f"cannot be written: {error}", "choose another folder with --run.dir=DIR")
    for lock in LOCKS.values():
        with suppress(OSError):  # lock_states() on other ranks reports the error
            lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def lock_states(folder: Path) -> dict[str, bool | str] | CheckResult:
    """Try to acquire each kind of lock on the file of make_locked_file(). Return {kind: state}. The state is True if another
    process holds the lock, False if this process acquired it, or the text of an error. If this rank does not see the file, return
    a CheckResult. Independent."""
    found: dict[str, bool | str] = {}
    for name, lock in LOCKS.items():
        try:
            with open(folder / PROBE, "r+b") as file:
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found[name] = False
        except FileNotFoundError as error:
            return CheckResult("run.dir", "wrong", f"some ranks do not see rank 0's file: {error}", "use a shared folder")
        except OSError as error:
            found[name] = isinstance(error, BlockingIOError) or str(error)
    return found


def lock_states_in_child(folder: Path) -> dict[str, bool | str]:
    """Run lock_states() in a child process, and return its result. A job of one rank needs this, because a process cannot test
    its own locks. Independent."""
    child = subprocess.run([sys.executable, "-c", _CHILD, str(folder)], capture_output=True, text=True, timeout=60, check=False)
    return {name: f"'{name}': True" in child.stdout for name in LOCKS}


def check_locks(states: Sequence[Mapping[str, bool | str]]) -> CheckResult:
    """Check that a process cannot acquire a lock in run.dir that rank 0 holds. `states`: the results of lock_states() on the
    other ranks. Pure."""
    bad = {name: next((one[name] for one in states if one[name] is not True), True) for name in LOCKS}
    if all(answer is True for answer in bad.values()):
        return CheckResult("locks", "ok", f"flock and fcntl exclude other processes (number tested: {len(states)})")
    texts: dict[bool | str, str] = {True: "works", False: "does not exclude other processes"}
    words = "; ".join(f"{name}: {texts.get(answer, str(answer))}" for name, answer in bad.items())
    fix = "mount Lustre with -o flock, or keep runs on another file system"
    return CheckResult("locks", "warning", f"{words}. Then only the text of RUN/lock keeps two jobs out of one run.dir", fix)


def check_room(folder: Path) -> CheckResult:
    """Check that there is space for all checkpoints that exist at the same time. These are run.keep checkpoints, and the
    checkpoint that is being written. Independent."""
    parent = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    status, keep = os.statvfs(parent), RunSettings.keep
    free, words = status.f_bavail * status.f_frsize, f"{folder}: {size(status.f_bavail * status.f_frsize)} free"
    sizes = [sum(f.stat().st_size for f in step.iterdir()) for step in folder.glob("checkpoints/step_*")]
    if not sizes:
        return CheckResult("room", "ok" if free > 1 << 30 else "note", f"{words}; the size of a checkpoint is not known yet")
    with suppress(UsageError, ValueError):
        keep = int(read_toml(folder / "config.toml").get("run.keep", keep))
    needed = max(sizes) * (keep + 1 - min(keep, len(sizes)))
    words += f", {size(needed)} more needed ({size(max(sizes))} per checkpoint, {keep} kept and one being written)"
    verdict = "wrong" if free < needed else "warning" if free < 2 * needed else "ok"
    return CheckResult("room", verdict, words, "" if verdict == "ok" else "make space, lower run.keep, or choose another run.dir")

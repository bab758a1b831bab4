"""Checks the size of /dev/shm, and finds the segments (files of shared memory) that killed jobs left there. Segments occupy
memory until they are removed."""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mpidp.doctor.facts import SHARED_MEMORY
from mpidp.doctor.findings import CheckResult, listed, size

# names of segments of MPICH and its derivatives, of Open MPI 5 and 4 (windows and messages), of UCX and of PSM
OF_MPI = re.compile(r"mpich_s|osc_(sm|rdma|ucx)\.|sm_segment\.|vader_segment\.|ucx_shm_posix_|psm\d?_shm")
SMALL = 64 << 20  # bytes; the size of /dev/shm in docker by default
# Bytes per rank. With less than OF_A_RANK no MPI library starts (MPICH needs 1.02 MiB). With less than SAFE some libraries crash,
# when they start or later: MPICH 5 below 9 MiB, MPICH 4 below 4.2 MiB, Intel MPI below 16 MiB.
OF_A_RANK, SAFE = 5 << 18, 16 << 20
LESS = "MPIR_CVAR_CH4_NETMOD=ofi (MPICH) or I_MPI_FABRICS=ofi (Intel MPI), with which MPI needs less shared memory"


@dataclass(frozen=True)
class Segment:
    """A file of shared memory of an MPI job."""

    host: str
    name: str
    bytes: int
    owner: str
    own: bool  # whether the segment belongs to this user
    age_seconds: float
    state: str  # "used", "gone" (no process has it open) or "unknown"

    def __str__(self) -> str:
        hours, minutes = divmod(int(max(0.0, self.age_seconds)) // 60, 60)
        return f"{self.host}:{SHARED_MEMORY}/{self.name}, {size(self.bytes)}, {self.owner}'s, {hours}:{minutes:02d} h old"


def find(host: str, folder: Path = Path(SHARED_MEMORY)) -> list[Segment]:
    """Return all segments of MPI jobs in `folder`. `host`: the name of this machine. Independent."""
    in_use, found = _in_use(folder), []
    for path in sorted(folder.iterdir()):
        with suppress(OSError):  # the file was removed in the meantime
            about = path.lstat()
            if OF_MPI.match(path.name) and path.is_file() and not path.is_symlink():
                state, owner = "used" if path.name in in_use else _state_by_lease(path), str(about.st_uid)
                with suppress(KeyError):
                    owner = pwd.getpwuid(about.st_uid).pw_name
                age, own = time.time() - about.st_mtime, about.st_uid == os.getuid()
                found.append(Segment(host, path.name, about.st_blocks * 512, owner, own, age, state))
    return found


def clean(segments: Sequence[Segment], folder: Path = Path(SHARED_MEMORY)) -> list[Segment]:
    """Remove those `segments` that belong to this user and that no process uses. Whether a process uses a segment is checked
    again before its removal. Return the removed segments. Independent."""
    in_use, removed = _in_use(folder), []
    for one in segments:
        if one.own and one.state == "gone" and one.name not in in_use:
            with suppress(OSError), _leased(folder / one.name):
                os.unlink(folder / one.name)
                removed.append(one)
    return removed


def _in_use(folder: Path) -> set[str]:
    """Return the names of files in `folder` that are in use. A file is in use if a process of this machine maps it or has it
    open. Processes that this user may not inspect are ignored."""
    start, found = f"{folder.resolve()}/", set[str]()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            lines = (process / "maps").read_text().splitlines()
            found.update(line.partition(start)[2].removesuffix(" (deleted)") for line in lines)
        with suppress(OSError):
            for handle in (process / "fd").iterdir():
                with suppress(OSError):
                    found.add(os.readlink(handle).removeprefix(start))
    return found


@contextmanager
def _leased(path: Path) -> Iterator[None]:
    """Return a context that holds a lease on a file. The kernel grants the lease only if no other process has the file open or
    mapped, also in other containers. Raises OSError if the kernel refuses the lease."""
    # If another process opens the file, the kernel sends SIGIO, which by default would end this process.
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        os.close(handle)
        signal.signal(signal.SIGIO, before)


def _state_by_lease(path: Path) -> str:
    try:
        with _leased(path):
            return "gone"
    except BlockingIOError:
        return "used"
    except OSError:
        return "unknown"


def check_segments(segments: Sequence[Segment], removed: Sequence[Segment]) -> list[CheckResult]:
    """Report the segments that ended jobs left in /dev/shm. `segments`: all segments found. `removed`: the removed segments.
    Pure."""
    left = [one for one in segments if one.state != "used" and one not in removed]
    own = [one for one in left if one.own and one.state == "gone"]
    others = [one for one in left if one not in own]
    found = []
    if removed:
        found.append(CheckResult("old segments", "ok", f"removed {_these(removed)}"))
    if own:  # Open MPI 5 leaves 72 KiB for every process that was started without mpirun
        verdict = "warning" if sum(one.bytes for one in own) > 1 << 20 else "note"
        words = f"left by your ended jobs: {_these(own)}"
        found.append(CheckResult("old segments", verdict, words, "--clean removes them; no process has them open"))
    if others:
        words = f"of other users, or of unknown state: {_these(others)}"
        found.append(CheckResult("old segments", "note", words, "ask the owners; before you remove a segment, check with "
                                                                "`fuser` that no process uses it"))
    return found or [CheckResult("old segments", "ok", f"none left by ended jobs; {len(segments)} in use")]


def _these(segments: Sequence[Segment]) -> str:
    total = f"{len(segments)} segment{'s' * (len(segments) > 1)}, {size(sum(one.bytes for one in segments))}\n"
    return total + listed([str(one) for one in sorted(segments, key=lambda one: -one.bytes)])


def check_shm(rooms: Mapping[str, tuple[int, int]], starting: int = 0) -> CheckResult:
    """Check that /dev/shm has enough free space for the shared memory of a run. Before MPI has started, also check that the
    space is enough for MPI to start. `starting`: the number of ranks per node that MPI is about to start, or 0 if MPI has
    started.

    `rooms`: (size, free space) of /dev/shm in bytes, by host. Pure."""
    host = min(rooms, key=lambda name: rooms[name][1])
    total, free = rooms[host]
    words = f"{SHARED_MEMORY} on {host}: {size(free)} free of {size(total)}"
    fix = "docker run --shm-size=8g, or mount -o remount,size=50% /dev/shm (a container's default is 64 MiB)"
    if free < OF_A_RANK * starting:
        return CheckResult("shared memory", "wrong", f"{words}: too little for MPI to start; MPI may crash with a bus error", fix)
    if free < SAFE * starting:
        words += f": {size(free // starting)} per rank. MPICH may crash below 9 MiB per rank, Intel MPI below 16 MiB"
        return CheckResult("shared memory", "warning", words, f"{fix}; or set {LESS}")
    if free < SMALL:
        words += ": gradients will be sent as MPI messages instead of through shared memory"
        return CheckResult("shared memory", "warning", words, fix)
    return CheckResult("shared memory", "ok", words)

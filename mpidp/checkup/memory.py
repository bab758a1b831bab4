"""/dev/shm: its size, and what dead jobs left in it. A killed job cannot remove its segments, and they are memory lost."""

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

from mpidp.checkup.facts import SHARED_MEMORY
from mpidp.checkup.findings import Finding, listed, size

# MPICH and its kin; Open MPI's windows and its messages (5, 4); UCX; PSM
OF_MPI = re.compile(r"mpich_s|osc_(sm|rdma|ucx)\.|sm_segment\.|vader_segment\.|ucx_shm_posix_|psm\d?_shm")
SMALL = 64 << 20  # docker's default
OF_A_RANK = 5 << 18  # MPICH 5 takes 1.02 MiB of each when it starts, and dies of a bus error without


@dataclass(frozen=True)
class Segment:
    """A file of some MPI job in /dev/shm."""

    host: str
    name: str
    bytes: int
    owner: str
    mine: bool
    age_seconds: float
    state: str  # used; gone: nothing has it open; unknown

    def __str__(self) -> str:
        hours, minutes = divmod(int(max(0.0, self.age_seconds)) // 60, 60)
        return f"{self.host}:{SHARED_MEMORY}/{self.name}, {size(self.bytes)}, {self.owner}'s, {hours}:{minutes:02d} h old"


def find(host: str, folder: Path = Path(SHARED_MEMORY)) -> list[Segment]:
    """All there. Independent."""
    held, found = _held(folder), []
    for path in sorted(folder.iterdir()):
        with suppress(OSError):  # removed meanwhile
            about = path.lstat()
            if OF_MPI.match(path.name) and path.is_file() and not path.is_symlink():
                state, owner = "used" if path.name in held else _lease(path), str(about.st_uid)
                with suppress(KeyError):
                    owner = pwd.getpwuid(about.st_uid).pw_name
                age, mine = time.time() - about.st_mtime, about.st_uid == os.getuid()
                found.append(Segment(host, path.name, about.st_blocks * 512, owner, mine, age, state))
    return found


def clean(segments: Sequence[Segment], folder: Path = Path(SHARED_MEMORY)) -> list[Segment]:
    """Remove those of this user that nothing has open, each looked at once more; which those were. Independent."""
    held, removed = _held(folder), []
    for one in segments:
        if one.mine and one.state == "gone" and one.name not in held:
            with suppress(OSError), _leased(folder / one.name):
                os.unlink(folder / one.name)
                removed.append(one)
    return removed


def _held(folder: Path) -> set[str]:
    """Names that some process of this machine maps or has open, as far as this user may see."""
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
    """The kernel lends a file only while nobody else has it open or mapped, in whatever container. OSError when it does not."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # sent, and deadly, should anybody open it meanwhile
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        os.close(handle)
        signal.signal(signal.SIGIO, before)


def _lease(path: Path) -> str:
    try:
        with _leased(path):
            return "gone"
    except BlockingIOError:
        return "used"
    except OSError:
        return "unknown"


def check_segments(segments: Sequence[Segment], removed: Sequence[Segment]) -> list[Finding]:
    """What is left of dead jobs. Pure."""
    left = [one for one in segments if one.state != "used" and one not in removed]
    mine = [one for one in left if one.mine and one.state == "gone"]
    others = [one for one in left if one not in mine]
    found = []
    if removed:
        found.append(Finding("old segments", "ok", f"removed {_these(removed)}"))
    if mine:  # Open MPI 5 leaves 72 KiB of every process that was started without mpirun
        verdict = "warning" if sum(one.bytes for one in mine) > 1 << 20 else "note"
        words = f"of dead jobs of yours: {_these(mine)}"
        found.append(Finding("old segments", verdict, words, "--clean removes them; nothing has them open"))
    if others:
        words = f"others' dead jobs, or what cannot be told: {_these(others)}"
        found.append(Finding("old segments", "note", words, "ask their owners; look with `fuser` before removing any"))
    return found or [Finding("old segments", "ok", f"none of dead jobs; {len(segments)} in use")]


def _these(segments: Sequence[Segment]) -> str:
    total = f"{len(segments)} segment{'s' * (len(segments) > 1)}, {size(sum(one.bytes for one in segments))}\n"
    return total + listed([str(one) for one in sorted(segments, key=lambda one: -one.bytes)])


def check_shm(rooms: Mapping[str, tuple[int, int]], starting: int = 0) -> Finding:
    """Is there room for a shared window, and for MPI to start so many ranks of a node? rooms: (bytes, free) by host. Pure."""
    host = min(rooms, key=lambda name: rooms[name][1])
    total, free = rooms[host]
    words = f"{SHARED_MEMORY} on {host}: {size(free)} free of {size(total)}"
    fix = "docker run --shm-size=8g, or mount -o remount,size=50% /dev/shm (a container's default is 64 MiB)"
    if free < OF_A_RANK * starting:
        return Finding("shared memory", "wrong", f"{words}: too little for MPI to start in, it may die of a bus error", fix)
    if free < SMALL:
        return Finding("shared memory", "warning", f"{words}: gradients will go as messages instead of a shared window", fix)
    return Finding("shared memory", "ok", words)

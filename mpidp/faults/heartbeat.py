"""The heartbeat board, on which each rank records its step and phase without MPI. If the job hangs, a report uses the board to
name the ranks that block the other ranks.

The ranks of a node share a small memory segment with one record for each rank. Writing a record takes microseconds and does not
access the disk. The record of a rank can be read even if the rank is stopped or its interpreter is blocked. When no rank of a
node makes progress, one of its ranks copies the segment to RUN/.board/HOST.json, which the other nodes read. If RUN/.board cannot
be written, a report has no information about the ranks of other nodes.
"""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import shutil
import struct
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi4py import MPI

SLOT = struct.Struct("<qqdd?23s")  # step, bucket, time at which the phase began, time of the last heartbeat, waits, phase
NODE = struct.Struct("<ddd")  # about another node: time stamp in its file, time at which the file changed, last heartbeat
CLOCK = struct.Struct("<d")  # time at which this node last wrote its file
WAITS = ("comm_wait", "reduce", "publish", "evaluate_wait", "checkpoint_wait")  # phases in which ranks mostly wait
ORDER = (  # order of the phases within a step
    "data", "compute", "comm_wait", "update", "reduce", "apply", "publish", "evaluate", "evaluate_wait", "checkpoint",
    "checkpoint_wait",
)
SILENT = "?"  # state of a rank without a heartbeat
LOST = {"T": "stopped (state T)", "t": "stopped by a debugger (state t)", "Z": "exited (state Z)", "X": "exited"}
STATES = LOST | {SILENT: "no heartbeat received", "D": "waiting for a disk or a file server (state D)"}
NAMED = 4  # maximum number of ranks listed in a message


@dataclass(frozen=True)
class HeartbeatRow:
    """The board's record of one rank. Times are given as seconds before now."""

    rank: int
    host: str
    pid: int
    step: int = 0
    phase: str = ""
    bucket: int = -1  # the gradient bucket that is being reduced; -1: none
    entered: float = 0.0  # time since the phase began
    heard: float = math.inf  # time since the last heartbeat
    state: str = SILENT  # state letter of the process in /proc
    waits: bool = False  # whether the rank waits for other ranks, for example for a message in the middle of the model

    @property
    def place(self) -> tuple[int, int]:
        """The progress of the rank as (step, index of the phase). Ranks with less progress have smaller tuples."""
        return self.step, ORDER.index(self.phase) if self.phase in ORDER else len(ORDER)

    def __str__(self) -> str:
        parts = [f"rank {self.rank} ({self.host}, pid {self.pid})"]
        parts += [f"{self.doing} for {self.entered:.0f} s"] if self.phase else []
        parts += [f"last heartbeat {self.heard:.0f} s ago"] if self.entered - self.heard >= 2 else []
        parts += [STATES[self.state]] if self.state in STATES else []
        return ", ".join(parts)

    @property
    def works(self) -> bool:
        """Whether the rank can make progress without waiting for other ranks."""
        return self.phase not in WAITS and not self.waits

    @property
    def doing(self) -> str:
        """A description of what the rank is doing, for messages."""
        waits = " (waiting for other ranks)" if self.waits and self.phase not in WAITS else ""
        return f"in phase {self.phase}{f' (bucket {self.bucket})' if self.bucket >= 0 else ''} of step {self.step}{waits}"


def blame(rows: list[HeartbeatRow]) -> tuple[str, list[HeartbeatRow]]:
    """Find the ranks that block the other ranks. Return (message that names them, rows of the blocking ranks).

    There are four groups of ranks. The first group that is not empty contains the blocking ranks. Group 1: ranks whose
    processes are stopped or have exited. Group 2: the ranks with the least progress, not counting ranks that wait for a
    message during their computation. If these ranks are in a phase in which ranks wait for each other, group 2 is empty.
    Group 3: ranks without a heartbeat. Group 4: of all ranks with a heartbeat, those with the least progress. Pure."""
    heard = [row for row in rows if row.state != SILENT]
    behind = _least([row for row in heard if row.works or row.phase in WAITS])
    works = bool(behind) and behind[0].works
    behind = behind if works else _least(heard)
    silent = [row for row in rows if row.state == SILENT]
    blamed = [row for row in heard if row.state in LOST] or (behind if works else silent or behind)
    others = Counter(row.doing for row in heard if row not in blamed)
    named = "; ".join(map(str, blamed[:NAMED])) + (f"; and {len(blamed) - NAMED} more" if len(blamed) > NAMED else "")
    if not others:
        alike = len({row.place for row in rows}) == 1 and len(rows) > 1
        network = "" if works else " (waiting for messages that did not arrive; check the network)"
        return (f"all ranks are in the same phase{network}: " if alike else "") + named, blamed
    waiting = ", ".join(f"{count} {'is' if count == 1 else 'are'} {doing}" for doing, count in others.most_common(NAMED))
    return f"the other ranks wait for {named}; of the others {waiting}", blamed


def _least(rows: list[HeartbeatRow]) -> list[HeartbeatRow]:
    """Return the rows with the least progress."""
    return [row for row in rows if row.place == min(other.place for other in rows)]


class HeartbeatBoard:
    """This rank's access to the board. It writes the record of this rank, and reads the records of all ranks. Independent."""

    def __init__(self, rank: int, hosts: list[str], pids: list[int], token: str, run_dir: Path) -> None:
        """`hosts`, `pids`: the host names and process ids of all ranks. `token`: a string that is unique to the job. It is part
        of the name of the shared memory file."""
        self.rank, self._hosts, self._pids, self._token, self._folder = rank, hosts, pids, token, run_dir / ".board"
        self.host = hosts[rank]
        here = [r for r, host in enumerate(hosts) if host == self.host]
        elsewhere = dict.fromkeys(host for host in hosts if host != self.host)
        self._slots = {r: CLOCK.size + i * SLOT.size for i, r in enumerate(here)}
        start = CLOCK.size + len(here) * SLOT.size
        self._nodes = {host: start + i * NODE.size for i, host in enumerate(elsewhere)}
        self._name = Path("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()) / f"mpidp_board_{token}_{here[0]}"
        size = start + len(elsewhere) * NODE.size
        try:
            self._handle = os.open(self._name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            os.posix_fallocate(self._handle, 0, size)  # otherwise a write could raise SIGBUS
            self._memory = mmap.mmap(self._handle, size)
        except OSError:  # the other ranks will see no heartbeat of this rank
            self._handle, self._memory = -1, mmap.mmap(-1, size)

    def unlink(self) -> None:
        """Remove the name of the shared memory file, so that no file remains after the job. Call this method when all ranks of
        the node have opened the file."""
        self._name.unlink(missing_ok=True)

    def write(self, step: int, phase: str, bucket: int, entered: float, heard: float, waits: bool = False) -> None:
        """Write the record of this rank. `bucket`: the gradient bucket that is being reduced, or -1. `entered`, `heard`: when the
        phase began, and when the last heartbeat occurred. Both are times of time.monotonic(). `waits`: whether the rank waits for
        other ranks."""
        SLOT.pack_into(self._memory, self._slots[self.rank], step, bucket, entered, heard, waits, phase.encode()[:23])

    def quiet_seconds(self) -> float:
        """Return the seconds since the last heartbeat of any rank of the job."""
        here = [SLOT.unpack_from(self._memory, at)[3] for at in self._slots.values()]
        return time.monotonic() - max(here + [NODE.unpack_from(self._memory, at)[2] for at in self._nodes.values()])

    def exchange(self, every_seconds: float) -> None:
        """Write the file of this node, and read the files of other nodes. If a rank of this node has already done this in the
        last `every_seconds` seconds, do nothing."""
        now = time.monotonic()
        if not self._nodes or now - CLOCK.unpack_from(self._memory)[0] < every_seconds:
            return
        CLOCK.pack_into(self._memory, 0, now)
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            temporary = self._folder / f".{self.host}.{self.rank}"
            content = {"token": self._token, "stamp": now, "rows": [asdict(row) for row in self._here()]}
            temporary.write_text(json.dumps(content))
            os.replace(temporary, self._folder / f"{self.host}.json")
        for host, at in self._nodes.items():
            stamp, rows = self._read(host)
            if rows and stamp != NODE.unpack_from(self._memory, at)[0]:
                NODE.pack_into(self._memory, at, stamp, now, now - min(row.heard for row in rows))

    def rows(self, silent_seconds: float) -> list[HeartbeatRow]:
        """Return the rows of all ranks. If the file of another node has not changed for `silent_seconds` seconds, the ranks of
        that node get the state SILENT."""
        found = {row.rank: row for row in self._here()}
        for host, at in self._nodes.items():
            fresh = time.monotonic() - NODE.unpack_from(self._memory, at)[1] < silent_seconds
            for row in self._read(host)[1]:
                found[row.rank] = row if fresh else replace(row, state=SILENT)
        return [found.get(r) or HeartbeatRow(r, *of) for r, of in enumerate(zip(self._hosts, self._pids, strict=True))]

    def claim_report(self) -> bool:
        """Return True on the first rank of this node that calls this method. This rank must print the report. On the other ranks,
        wait until the process of the first rank has exited, then return False."""
        with suppress(OSError, ValueError):  # there is no shared file
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(self._handle, fcntl.LOCK_EX)
                return False
        return True

    def close(self) -> None:
        """On rank 0, remove the files of all nodes. On other ranks, do nothing."""
        if self.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _here(self) -> list[HeartbeatRow]:
        now, rows = time.monotonic(), []
        for rank, at in self._slots.items():
            step, bucket, entered, heard, waits, phase = SLOT.unpack_from(self._memory, at)
            row, name = HeartbeatRow(rank, self.host, self._pids[rank]), phase.rstrip(b"\0").decode(errors="replace")
            position = {"step": step, "phase": name, "bucket": bucket, "entered": now - entered, "heard": now - heard}
            rows.append(replace(row, **position, state=process_state(row.pid)[0], waits=waits) if heard else row)
        return rows

    def _read(self, host: str) -> tuple[float, list[HeartbeatRow]]:
        """Return (time stamp, rows) of the file of node `host`. If the file is missing or belongs to another job, there are no
        rows."""
        try:
            content: dict[str, Any] = json.loads((self._folder / f"{host}.json").read_text())
            rows = [HeartbeatRow(**row) for row in content["rows"]] if content["token"] == self._token else []
            return float(content["stamp"]), rows
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0, []


def open_heartbeat_board(comm: MPI.Intracomm, host: str, run_dir: Path) -> HeartbeatBoard:
    """Open the board of a job. `host`: the name of this rank's node. Collective over comm."""
    hosts, pids, tokens = zip(*comm.allgather((host, os.getpid(), os.urandom(8).hex())), strict=True)
    board = HeartbeatBoard(comm.rank, list(hosts), list(pids), tokens[0], run_dir)
    try:
        comm.Barrier()
    finally:
        board.unlink()
    return board


def process_state(pid: int) -> tuple[str, int]:
    """Return (state letter, start time in clock ticks) of a process on this machine, as in /proc/PID/stat.

    Returns ("X", 0) if there is no such process, and ("", 0) if its state is unknown. Independent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except FileNotFoundError:
        return "X" if os.path.isdir("/proc/self") else "", 0
    except (OSError, IndexError):
        return "", 0

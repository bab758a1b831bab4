"""Where every rank is, kept outside MPI: those who wait can be told for whom, and nobody needs to answer.

The ranks of a node write into a small memory that they share, a fixed slot each: a write costs microseconds and touches no disk,
and what a rank wrote last can be read when it is stopped or holds its interpreter for ever. While its ranks stand still, a node
copies its memory to RUN/.board/HOST.json for the other nodes: one file a node, since two of them must not write one page. A
folder that vanishes or cannot be written costs the other nodes' words, nothing else.
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

SLOT = struct.Struct("<qqdd24s")  # step, bucket, when it entered the phase, its last sign of life, phase
NODE = struct.Struct("<ddd")  # another node: its file's stamp, when that changed, the last sign of life there
CLOCK = struct.Struct("<d")  # when this node last told the others
WAITS = ("comm_wait", "reduce", "publish", "evaluate_wait", "checkpoint_wait")  # here a rank mostly waits for others
ORDER = (  # of a step
    "data", "compute", "comm_wait", "update", "reduce", "apply", "publish", "evaluate", "evaluate_wait", "checkpoint",
    "checkpoint_wait",
)
SILENT = "?"
LOST = {"T": "stopped (state T)", "t": "stopped by a debugger (state t)", "Z": "dead (state Z)", "X": "dead"}
STATES = LOST | {SILENT: "not heard of", "D": "waiting for a disk or a file server (state D)"}
NAMED = 4  # ranks by name in one message


@dataclass(frozen=True)
class HeartbeatRow:
    """What is known of a rank; times are seconds ago."""

    rank: int
    host: str
    pid: int
    step: int = 0
    phase: str = ""
    bucket: int = -1  # the gradient bucket it reduces, where it reduces them one by one
    entered: float = 0.0  # the phase
    heard: float = math.inf  # its last sign of life
    state: str = SILENT  # its process's letter in /proc

    @property
    def place(self) -> tuple[int, int]:
        """How far it has got."""
        return self.step, ORDER.index(self.phase) if self.phase in ORDER else len(ORDER)

    def __str__(self) -> str:
        words = [f"rank {self.rank} ({self.host}, pid {self.pid})"]
        words += [f"{self.doing} since {self.entered:.0f} s"] if self.phase else []
        words += [f"its last sign of life {self.heard:.0f} s ago"] if self.entered - self.heard >= 2 else []
        words += [STATES[self.state]] if self.state in STATES else []
        return ", ".join(words)

    @property
    def doing(self) -> str:
        """For a message."""
        return f"in {self.phase}{f' (bucket {self.bucket})' if self.bucket >= 0 else ''} of step {self.step}"


def blame(rows: list[HeartbeatRow]) -> tuple[str, list[HeartbeatRow]]:
    """For whom everybody waits, in words and as rows: a process that is stopped or dead; else who is furthest behind, if that is
    where a rank works; else whoever is not heard of; else who is furthest behind. Pure."""
    heard = [row for row in rows if row.state != SILENT]
    behind = [row for row in heard if row.place == min(other.place for other in heard)]
    silent = [row for row in rows if row.state == SILENT]
    works = bool(behind) and behind[0].phase not in WAITS
    blamed = [row for row in heard if row.state in LOST] or (behind if works else silent or behind)
    others = Counter(row.doing for row in heard if row not in blamed)
    named = "; ".join(map(str, blamed[:NAMED])) + (f"; and {len(blamed) - NAMED} more" if len(blamed) > NAMED else "")
    if not others:
        alike = len({row.place for row in rows}) == 1 and len(rows) > 1
        network = "" if works else ": what they wait for never came, look at the network"
        return (f"no rank is behind the others{network}; " if alike else "") + named, blamed
    waiting = ", ".join(f"{count} {'is' if count == 1 else 'are'} {doing}" for doing, count in others.most_common(NAMED))
    return f"everybody waits for {named}; of the others {waiting}", blamed


class HeartbeatBoard:
    """This rank's place on its node's board, and the view of all others. Independent."""

    def __init__(self, rank: int, hosts: list[str], pids: list[int], token: str, run_dir: Path) -> None:
        """hosts, pids: of all ranks. token: of this job alone; the board's memory lies under it until unlink()."""
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
            os.posix_fallocate(self._handle, 0, size)  # or writing to it could end in a SIGBUS
            self._memory = mmap.mmap(self._handle, size)
        except OSError:  # neighbours will say that this rank has not been heard of
            self._handle, self._memory = -1, mmap.mmap(-1, size)

    def unlink(self) -> None:
        """All of the node have opened the memory: nothing of it stays behind, however the job ends."""
        self._name.unlink(missing_ok=True)

    def write(self, step: int, phase: str, bucket: int, entered: float, heard: float) -> None:
        """Where this rank is; times by time.monotonic(), which the processes of a machine share."""
        SLOT.pack_into(self._memory, self._slots[self.rank], step, bucket, entered, heard, phase.encode()[:24])

    def quiet_seconds(self) -> float:
        """How long ago any rank of the job gave a sign of life."""
        here = [SLOT.unpack_from(self._memory, at)[3] for at in self._slots.values()]
        return time.monotonic() - max(here + [NODE.unpack_from(self._memory, at)[2] for at in self._nodes.values()])

    def exchange(self, every_seconds: float) -> None:
        """Tell the other nodes and hear from them, if no rank of this node has for so long."""
        now = time.monotonic()
        if not self._nodes or now - CLOCK.unpack_from(self._memory)[0] < every_seconds:
            return
        CLOCK.pack_into(self._memory, 0, now)
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            temporary = self._folder / f".{self.host}.{self.rank}"
            told = {"token": self._token, "stamp": now, "rows": [asdict(row) for row in self._here()]}
            temporary.write_text(json.dumps(told))
            os.replace(temporary, self._folder / f"{self.host}.json")
        for host, at in self._nodes.items():
            stamp, rows = self._read(host)
            if rows and stamp != NODE.unpack_from(self._memory, at)[0]:
                NODE.pack_into(self._memory, at, stamp, now, now - min(row.heard for row in rows))

    def rows(self, silent_seconds: float) -> list[HeartbeatRow]:
        """Every rank; those of a node whose file is so old are not heard of."""
        found = {row.rank: row for row in self._here()}
        for host, at in self._nodes.items():
            fresh = time.monotonic() - NODE.unpack_from(self._memory, at)[1] < silent_seconds
            for row in self._read(host)[1]:
                found[row.rank] = row if fresh else replace(row, state=SILENT)
        return [found.get(r) or HeartbeatRow(r, *of) for r, of in enumerate(zip(self._hosts, self._pids, strict=True))]

    def claim_report(self) -> bool:
        """One rank of a node does: the first to ask. The others are told so when its process is gone."""
        with suppress(OSError, ValueError):  # of no file
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(self._handle, fcntl.LOCK_EX)
                return False
        return True

    def close(self) -> None:
        """Rank 0 takes the files away."""
        if self.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _here(self) -> list[HeartbeatRow]:
        now, rows = time.monotonic(), []
        for rank, at in self._slots.items():
            step, bucket, entered, heard, phase = SLOT.unpack_from(self._memory, at)
            row, name = HeartbeatRow(rank, self.host, self._pids[rank]), phase.rstrip(b"\0").decode(errors="replace")
            told = {"step": step, "phase": name, "bucket": bucket, "entered": now - entered, "heard": now - heard}
            rows.append(replace(row, **told, state=process_state(row.pid)[0]) if heard else row)
        return rows

    def _read(self, host: str) -> tuple[float, list[HeartbeatRow]]:
        """(stamp, rows) of another node's file; no rows where there is none of this job."""
        try:
            told: dict[str, Any] = json.loads((self._folder / f"{host}.json").read_text())
            rows = [HeartbeatRow(**row) for row in told["rows"]] if told["token"] == self._token else []
            return float(told["stamp"]), rows
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0, []


def open_heartbeat_board(comm: MPI.Intracomm, host: str, run_dir: Path) -> HeartbeatBoard:
    """host: this rank's. Collective over comm."""
    hosts, pids, tokens = zip(*comm.allgather((host, os.getpid(), os.urandom(8).hex())), strict=True)
    board = HeartbeatBoard(comm.rank, list(hosts), list(pids), tokens[0], run_dir)
    try:
        comm.Barrier()
    finally:
        board.unlink()
    return board


def process_state(pid: int) -> tuple[str, int]:
    """(state, when it was started) of a process of this machine; X: there is none; ("", 0): that is not known. Independent."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return words[0], int(words[19])
    except FileNotFoundError:
        return "X" if os.path.isdir("/proc/self") else "", 0
    except (OSError, IndexError):
        return "", 0

"""RUN: who may write there, and whether a command begins, goes on, or has nothing left to do."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpidp.errors import UsageError
from mpidp.faults.heartbeat import process_state

COUNT_SECONDS = 1.0  # between two signs of life in the lock
LOCK_BYTES = 512  # always written whole


class RunLock:
    """RUN/lock, held by rank 0 while the job runs; taken over when its holder is gone. Independent.

    The kernel's lock on the open file decides between processes of one machine and dies with its holder. What the file says
    decides where that reaches no further: a thread of the holder counts in it, and a lock whose count stands still is nobody's.
    A requeued job takes the lock from its own old copy, which still runs where only Slurm's daemon of that node died; the old
    copy finds another's word in the file.
    """

    def __init__(
        self, run_dir: Path, patience_seconds: float = 3.0, watch_seconds: float = 10.0, ours: bool = False
    ) -> None:
        """UsageError when the folder cannot be written to, or a live job holds it. patience_seconds: mpirun may end a moment
        before its ranks do. watch_seconds: for a holder on another machine to show that it lives. ours: the holder was a rank of
        this very job, and is dead."""
        self.path = run_dir / "lock"
        self.lost = False  # another holds it now
        self._handle: int | None = None
        self._me = _myself()
        self._stop = threading.Event()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._take(patience_seconds, watch_seconds, ours)
        except OSError as error:
            raise UsageError(f"run.dir={run_dir} cannot be written to ({error}); choose another with --run.dir=DIR") from error
        self._thread = threading.Thread(target=self._count, name="lock", daemon=True)
        self._thread.start()

    def held(self) -> bool:
        """Is the lock still this job's? A folder that vanished is nobody else's."""
        return not self.lost and self._look(write=False)

    def release(self) -> None:
        """Remove the lock, if it is still this job's."""
        if self._handle is not None:
            self._stop.set()
            self._thread.join(5.0)
            if self.held():
                with suppress(OSError):
                    self.path.unlink()
            os.close(self._handle)
            self._handle = None

    def _take(self, patience: float, watch: float, ours: bool) -> None:
        began, first = time.monotonic(), None
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            free, holder, waited = _lock_file(handle), _holder(handle), time.monotonic() - began
            if holder and self._follows(holder, ours):
                os.close(handle)
                return self._replace(settle=not ours)
            if not holder or all(holder.get(key, self._me[key]) == self._me[key] for key in ("host", "boot")):
                who = f"process {holder['pid']} on this host" if _alive(holder) else "" if free else "another process"
                if not who and self._is(handle):  # else it was released and removed since it was opened
                    self._handle = handle
                    return self._write(handle)
                who, give_up = who or "another process", waited >= patience
            else:
                who = f"a job on {holder['host']} (pid {holder['pid']}" + (f", job {holder['job']})" if holder["job"] else ")")
                if first is None:
                    print(f"{self.path}: held by {who}: looking for {watch:g} s whether it is alive", flush=True)
                first = first or holder
                give_up = holder != first
                if not give_up and waited >= watch:
                    print(f"{self.path}: taken over from {who}, which is gone", flush=True)
                    os.close(handle)
                    return self._replace(settle=True)
            os.close(handle)
            if give_up:
                raise UsageError(
                    f"{self.path}: in use by {who}. If that job is gone, remove the file; else choose another folder with "
                    "--run.dir=DIR"
                )
            time.sleep(0.1)

    def _follows(self, holder: Mapping[str, Any], ours: bool) -> bool:
        """Is this a later start of the holder's Slurm job; if ours, the same start of it?"""
        job, restart = self._me["job"], self._me["restart"]
        return holder["job"] == job and (holder["restart"] == restart if ours else bool(job) and holder["restart"] < restart)

    def _replace(self, settle: bool) -> None:
        """By a new file, which the old holder notices; settle: until it has, and until it is clear who of two came last."""
        temporary = self.path.with_name(f".lock.{self._me['token']}")
        self._handle = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644)
        _lock_file(self._handle)
        self._write(self._handle)
        os.replace(temporary, self.path)
        if settle:
            time.sleep(2 * COUNT_SECONDS)
        if not self.held():
            os.close(self._handle)
            raise UsageError(f"{self.path}: another job took it at the same moment; choose another folder with --run.dir=DIR")

    def _write(self, handle: int) -> None:
        os.pwrite(handle, json.dumps(self._me).encode().ljust(LOCK_BYTES), 0)
        os.ftruncate(handle, LOCK_BYTES)

    def _count(self) -> None:
        while not self._stop.wait(COUNT_SECONDS) and self._look(write=True):
            self._me["count"] += 1

    def _look(self, write: bool) -> bool:
        """Opened anew, which is when network file systems look and tell."""
        with suppress(OSError):
            handle = os.open(self.path, os.O_RDWR)
            try:
                self.lost = _holder(handle).get("token", self._me["token"]) != self._me["token"]
                if write and not self.lost:
                    self._write(handle)
            finally:
                os.close(handle)
        return not self.lost

    def _is(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False


def _myself() -> dict[str, Any]:
    """What a holder writes: which process of which machine (`boot` tells machines of one name apart), and which job."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    job, restart = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "")
    return {
        "host": socket.gethostname(), "boot": boot, "pid": os.getpid(), "started": process_state(os.getpid())[1], "job": job,
        "restart": int(restart) if restart.isdigit() else 0, "token": secrets.token_hex(8), "count": 0,
    }


def _holder(handle: int) -> dict[str, Any]:
    """What the file says; nothing where it cannot be read: its writer died, or is about to write."""
    try:
        told = json.loads(os.pread(handle, 4096, 0))
        return {"job": "", **told, "host": str(told["host"]), "pid": int(told["pid"]), "restart": int(told.get("restart", 0))}
    except (ValueError, KeyError, TypeError):
        return {}


def _lock_file(handle: int) -> bool:
    """The kernel's lock; free too where there are no such locks: what the file says must do."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _alive(holder: Mapping[str, Any]) -> bool:
    """Whether a process of this machine runs, and is the one that was meant; one that is dead and not yet buried does not."""
    if (pid := holder.get("pid", 0)) <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    state, started = process_state(pid)
    return state not in ("Z", "X") and holder.get("started", started) == started

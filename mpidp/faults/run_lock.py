"""The lock file RUN/lock, which ensures that only one job writes to a run's folder."""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Required, TypedDict

from mpidp.errors import UsageError
from mpidp.faults.heartbeat import process_state
from mpidp.runtime.json_file import parse_json
from mpidp.runtime.log import log

COUNT_SECONDS = 1.0  # time between two updates of the counter in the lock
LOCK_BYTES = 512  # size of the lock file; each write replaces the whole content


class _Holder(TypedDict, total=False):
    """The content of the lock file."""

    host: Required[str]
    pid: Required[int]
    boot: str
    started: int
    job: str
    restart: int
    token: str
    count: int


class RunLock:
    """The lock file RUN/lock. Rank 0 holds the lock while the job runs. When the holder no longer runs, another job can take over
    the lock. Independent.

    On one machine, the kernel's lock on the open file (flock) determines the holder. The kernel releases this lock when the
    holder exits. Between machines, the content of the file determines the holder. The holder increments a counter in the file. If
    the counter does not change, the holder no longer runs. A requeued Slurm job takes over the lock of its earlier launch. If
    processes of the earlier launch still run, they find a different token in the file and stop.
    """

    def __init__(
        self, run_dir: Path, patience_seconds: float = 3.0, watch_seconds: float = 10.0, ours: bool = False, name: str = "lock",
        option: str = "run.dir",
    ) -> None:
        """Acquire the lock. Raises UsageError if the folder is not writable, or if a running job holds the lock.

        `patience_seconds`: how long to wait for a holder on this machine to exit. If `patience_seconds` is infinity, wait
        until the holder has finished, even if the holder is on another machine. `watch_seconds`: how long to watch the counter
        of a holder on another machine. `ours`: whether the holder was a failed rank of this job. `name`: the name of the lock
        file. `option`: the setting that determines the folder. Error messages name this setting."""
        self.path, self._option = run_dir / name, option
        self.lost = False  # True once another job has taken the lock
        self._handle: int | None = None
        self._me = _myself()
        self._stop = threading.Event()
        try:
            self._acquire(patience_seconds, watch_seconds, ours)
        except OSError as error:
            raise UsageError(f"{option}={run_dir} cannot be written to ({error}). Choose another --{option}=DIR") from error
        self._thread = threading.Thread(target=self._count, name="lock", daemon=True)
        self._thread.start()

    def held(self) -> bool:
        """Return whether this job still holds the lock. If the lock file has been deleted, the job still holds the lock."""
        return not self.lost and self._check(write=False)

    def release(self) -> None:
        """Remove the lock file, if this job still holds the lock."""
        if self._handle is not None:
            self._stop.set()
            self._thread.join(5.0)
            if self.held():
                with suppress(OSError):
                    self.path.unlink()
            os.close(self._handle)
            self._handle = None

    def _acquire(self, patience: float, watch: float, ours: bool) -> None:
        began, first = time.monotonic(), None
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            free, holder, waited = _lock_file(handle), _holder(handle), time.monotonic() - began
            if holder and self._follows(holder, ours):
                os.close(handle)
                return self._replace(confirm=not ours)
            if not holder or all(holder.get(key, self._me[key]) == self._me[key] for key in ("host", "boot")):
                who = f"process {holder['pid']} on this host" if _alive(holder) else "" if free else "another process"
                if not who and self._is(handle):  # otherwise the file was removed after it was opened
                    return self._hold(handle, self.path)
                who, give_up = who or "another process", waited >= patience
                if first is None and patience == math.inf:
                    log.info("%s: the lock is held by %s. Waiting until that process has finished", self.path, who)
                    first = self._me
            else:
                who = f"a job on {holder['host']} (pid {holder['pid']}" + (f", job {holder['job']})" if holder["job"] else ")")
                if first is None:
                    log.info("%s: the lock is held by %s. Checking for %g s whether that job still runs", self.path, who, watch)
                first = first or holder
                give_up = holder != first and patience < math.inf
                if holder != first:  # the holder is running
                    began, first, waited = time.monotonic(), holder, 0.0
                if not give_up and waited >= watch:
                    log.info("%s: the lock is taken over from %s, which no longer runs", self.path, who)
                    os.close(handle)
                    return self._replace(confirm=True)
            os.close(handle)
            if give_up:
                raise UsageError(
                    f"{self.path}: in use by {who}. If that job no longer runs, remove the file; otherwise choose another folder "
                    f"with --{self._option}=DIR"
                )
            time.sleep(0.1)

    def _follows(self, holder: Mapping[str, Any], ours: bool) -> bool:
        """Return whether this job may take over the lock from `holder`. If `ours` is False, this job must be a later launch of
        the holder's Slurm job. If `ours` is True, this job must be the same launch."""
        job, restart = self._me["job"], self._me["restart"]
        return holder["job"] == job and (holder["restart"] == restart if ours else bool(job) and holder["restart"] < restart)

    def _replace(self, confirm: bool) -> None:
        """Replace the lock file. If the old holder still runs, it notices the change and stops. `confirm`: whether to wait, so
        that a replacement by another job at the same time is noticed. Raises UsageError if another job has replaced the file,
        too."""
        temporary = self.path.with_name(f".lock.{self._me['token']}")
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        _lock_file(handle)
        self._hold(handle, temporary)
        if confirm:
            time.sleep(2 * COUNT_SECONDS)
        if not self.held():
            os.close(handle)
            raise UsageError(
                f"{self.path}: another job acquired the lock at the same time. Choose another folder with --{self._option}=DIR"
            )

    def _hold(self, handle: int, path: Path) -> None:
        """Write this job's content to the lock file, and keep the file open. `path`: the present name of the open file. If it is
        a temporary name, the file then replaces RUN/lock. After an OSError, the file `path` does not exist."""
        try:
            self._write(handle)
            if path != self.path:
                os.replace(path, self.path)
        except OSError:
            os.close(handle)
            with suppress(OSError):
                path.unlink()
            raise
        self._handle = handle

    def _write(self, handle: int) -> None:
        os.pwrite(handle, json.dumps(self._me).encode().ljust(LOCK_BYTES), 0)
        os.ftruncate(handle, LOCK_BYTES)

    def _count(self) -> None:
        while not self._stop.wait(COUNT_SECONDS) and self._check(write=True):
            self._me["count"] += 1

    def _check(self, write: bool) -> bool:
        """Return whether the file still has this job's token. The file is opened again, because network file systems then read
        current data. If it cannot be opened, return the previous answer. `write`: whether to write the counter to the file."""
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
    """Return what a holder writes into the file: its process, its machine and its job. The entry `boot` distinguishes machines
    with the same name."""
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
    """Return the content of the lock file. Return {} if the content is incomplete, for example because its writer failed."""
    with suppress(ValueError):
        return {"job": "", "restart": 0, **parse_json(os.pread(handle, 4096, 0), _Holder)}
    return {}


def _lock_file(handle: int) -> bool:
    """Try to acquire the kernel's lock on the file, and return whether this succeeded. On file systems without kernel locks,
    return True."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _alive(holder: Mapping[str, Any]) -> bool:
    """Return whether the holder's process runs on this machine. Return False for a zombie, and for a later process with the same
    pid."""
    if not 0 < (pid := holder.get("pid", 0)) < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    state, started = process_state(pid)
    return state not in ("Z", "X") and holder.get("started", started) == started

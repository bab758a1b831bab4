"""RUN: who may write there, and whether a command begins, goes on, or has nothing left to do."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpi4py import MPI

from mpidp import checkpoint
from mpidp.comm.mesh import together
from mpidp.config import FIXED, Config, fields_of
from mpidp.errors import CheckpointError, UsageError


class RunLock:
    """RUN/lock, held by rank 0 while the job runs; taken over when its holder is dead. Independent.

    The kernel's lock on the open file decides between processes of one host and dies with its holder. What the file says
    decides where that reaches no further: other hosts, and file systems without such locks.
    """

    def __init__(self, run_dir: Path, patience_seconds: float = 3.0) -> None:
        """UsageError when the folder cannot be written to, or a live job holds it for longer than patience_seconds: mpirun
        may end a moment before its ranks do."""
        self.path = run_dir / "lock"
        self._handle: int | None = None
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID", "")}
        deadline = time.monotonic() + patience_seconds
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            while (held := self._try()) and time.monotonic() < deadline:
                time.sleep(0.1)
            if held or self._handle is None:
                raise UsageError(
                    f"{self.path}: in use by {held}. If that job is gone, remove the file; else choose another folder with "
                    "--run.dir=DIR"
                )
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(holder).encode(), 0)
        except OSError as error:
            raise UsageError(f"run.dir={run_dir} cannot be written to ({error}); choose another with --run.dir=DIR") from error

    def _try(self) -> str:
        """Take the lock, or say who holds it."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        held = ""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = "another process"
        except OSError:
            pass  # no such locks here: what the file says must do
        host, pid = _holder(handle)
        if host != socket.gethostname():
            held = f"a job on {host} (pid {pid})"
        elif _alive(pid):
            held = f"process {pid} on this host"
        if not held and not self._still_there(handle):
            held = "another process"  # released and removed since it was opened
        if held:
            os.close(handle)
        else:
            self._handle = handle
        return held

    def _still_there(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the lock."""
        if self._handle is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None


def _holder(handle: int) -> tuple[str, int]:
    """(host, pid); pid 0 where the file does not say: its writer died, or is about to write."""
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        return str(holder["host"]), int(holder["pid"])
    except (ValueError, KeyError, TypeError):
        return socket.gethostname(), 0


def _alive(pid: int) -> bool:
    """Whether a process of this host runs; one that is dead and not yet buried does not."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return True


def set_aside(run_dir: Path) -> Path | None:
    """Move an earlier run's files into RUN/previous_N, so that resume=never loses nothing. Independent."""
    names = [n for n in ("checkpoints", "latest", "metrics.jsonl", "config.toml") if (run_dir / n).exists()]
    if not names:
        return None
    number = 1
    while (run_dir / f"previous_{number}").exists():
        number += 1
    aside = run_dir / f"previous_{number}"
    aside.mkdir()
    for name in names:
        os.rename(run_dir / name, aside / name)
    return aside


def find_checkpoint(run_dir: Path, resume: str, comm: MPI.Intracomm) -> tuple[checkpoint.Reader | None, list[str]]:
    """What `run.resume` says to start from, and what to tell the user. Collective over comm.

    auto: the newest valid checkpoint, else the beginning. must: CheckpointError when there is none. never: the beginning;
    an earlier run's files are set aside.
    """
    notes: list[str] = []
    if resume == "never":
        aside: Path | None = None
        with together(comm):
            if comm.rank == 0:
                aside = set_aside(run_dir)
        if aside is not None:
            notes.append(f"run.resume=never: the earlier run was moved to {aside}")
        return None, notes
    path, passed_over = checkpoint.newest_valid(run_dir, comm)
    notes += [f"passed over an invalid checkpoint: {reason}" for reason in passed_over]
    if path is None:
        if resume == "must":
            raise CheckpointError.on_every_rank(
                f"run.resume=must, but {run_dir / 'checkpoints'} holds no checkpoint; use auto to begin"
            )
        return None, notes
    return checkpoint.Reader(path), notes


def refuse_changes(saved: Mapping[str, Any], config: Config) -> None:
    """UsageError naming every setting that must stay as it was and did not. saved: {section.key: value}. Independent."""
    changed = [
        f"{key} was {saved[key]!r}, is {value!r}"
        for key, about, value in fields_of(config)
        if about.metadata["resume"] == FIXED and key in saved and saved[key] != value
    ]
    if changed:
        raise UsageError(
            f"{config.run.dir} holds a checkpoint of another run: {'; '.join(changed)}. Give the old values to go on, another "
            "--run.dir to begin beside it, or --run.resume=never to set it aside"
        )

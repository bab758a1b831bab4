"""RUN: who may write there, and whether a command begins, goes on, or has nothing left to do."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpi4py import MPI

from mpidp import checkpoint
from mpidp.comm.mesh import together
from mpidp.config import FIXED, Config, fields_of
from mpidp.errors import CheckpointError, UsageError

_ELSE = "choose another folder with --run.dir=DIR"


class RunLock:
    """RUN/lock, held by rank 0 while the job runs; taken over when its holder is dead. Independent.

    The kernel's lock on the open file decides between processes of one host and dies with its holder. What the file says
    decides where that reaches no further: other hosts, and file systems without such locks.
    """

    def __init__(self, run_dir: Path) -> None:
        """UsageError when the folder cannot be written to, or a live job holds it."""
        self.path = run_dir / "lock"
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID", "")}
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._handle: int | None = self._open()
            self._refuse_if_held(self._handle)
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(holder).encode(), 0)
        except OSError as error:
            raise UsageError(f"run.dir={run_dir} cannot be written to ({error}); choose another with --run.dir=DIR") from error

    def _open(self) -> int:
        """The lock file, with the kernel's lock on it."""
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                host, pid = self._holder(handle)
                os.close(handle)
                raise UsageError(f"{self.path}: in use by process {pid or '?'} on {host}; {_ELSE}") from None
            except OSError:
                return handle  # no such locks here
            try:
                if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                    return handle
            except FileNotFoundError:
                pass
            os.close(handle)  # released and removed since it was opened

    def _holder(self, handle: int) -> tuple[str, int]:
        """(host, pid); pid 0 where the file does not say: its writer died, or is about to write."""
        try:
            holder = json.loads(os.pread(handle, 4096, 0))
            return str(holder["host"]), int(holder["pid"])
        except (ValueError, KeyError, TypeError):
            return socket.gethostname(), 0

    def _refuse_if_held(self, handle: int) -> None:
        host, pid = self._holder(handle)
        if host != socket.gethostname():
            os.close(handle)
            raise UsageError(f"{self.path}: in use by a job on {host} (pid {pid}). If that job is gone, remove the file; {_ELSE}")
        if _alive(pid):
            os.close(handle)
            raise UsageError(f"{self.path}: in use by process {pid} on this host; {_ELSE}")

    def release(self) -> None:
        """Remove the lock."""
        if self._handle is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
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

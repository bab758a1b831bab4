"""Collects facts about one rank and its machine. The checks compare the facts of all ranks."""

from __future__ import annotations

import importlib
import os
import platform
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import mpidp
from mpidp.runtime.environment import WAITING

SHARED_MEMORY = "/dev/shm"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class MachineFacts:
    """Facts about one rank and its machine. The values can be pickled, because ranks exchange them."""

    rank: int
    host: str
    cores: tuple[int, ...]  # cores that the rank may use
    host_cores: int  # number of cores of the machine
    threads: dict[str, str] = field(default_factory=dict)  # the variables in THREADS that are set
    waiting: dict[str, str] = field(default_factory=dict)  # the variables in environment.WAITING that are set
    versions: dict[str, str] = field(default_factory=dict)  # versions of libraries, by name
    broken: dict[str, str] = field(default_factory=dict)  # modules that cannot be imported or used, and their errors
    gpus: tuple[tuple[str, str], ...] = ()  # (UUID, name) of visible GPUs
    shm: tuple[int, int] = (0, 0)  # size of /dev/shm and free space in it, bytes


def gather(rank: int, library: str) -> MachineFacts:
    """Return the facts of this process. `rank`: the rank of this process. `library`: name and version of the MPI library.
    Independent."""
    versions = {"mpidp": mpidp.__version__, "python": platform.python_version(), "MPI": library}
    broken, gpus = {}, []
    for name in ("torch", "numpy", "h5py", "mpi4py"):
        try:
            module: Any = importlib.import_module(name)
            versions[name] = str(module.__version__)
            if name == "torch" and module.cuda.is_available():
                name = "torch.cuda"  # the name in the error message, because the calls below may fail
                seen = [module.cuda.get_device_properties(index) for index in range(module.cuda.device_count())]
                gpus = [(str(one.uuid), str(one.name)) for one in seen]
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}"
    threads = {name: os.environ[name] for name in THREADS if name in os.environ}
    waiting = {name: os.environ[name] for name in sorted(WAITING) if name in os.environ}
    cores = tuple(sorted(os.sched_getaffinity(0)))
    host, host_cores = socket.gethostname(), os.cpu_count() or 1
    return MachineFacts(rank, host, cores, host_cores, threads, waiting, versions, broken, tuple(gpus), shared_memory())


def shared_memory() -> tuple[int, int]:
    """Return (size, free space) of /dev/shm in bytes, or (0, 0) if it does not exist. Independent."""
    with suppress(OSError):
        status = os.statvfs(SHARED_MEMORY)
        return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    return 0, 0


def nodes(facts: Sequence[MachineFacts]) -> dict[str, list[MachineFacts]]:
    """Return {host: facts of its ranks, in rank order}. Pure."""
    found: dict[str, list[MachineFacts]] = {}
    for one in facts:
        found.setdefault(one.host, []).append(one)
    return found

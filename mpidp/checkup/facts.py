"""What one rank can say of itself and its machine; the checks judge what all ranks said."""

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

SHARED_MEMORY = "/dev/shm"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Facts:
    """Of one rank. Plain values alone: they travel."""

    rank: int
    host: str
    cores: tuple[int, ...]  # that it may use
    host_cores: int  # of the machine
    threads: dict[str, str] = field(default_factory=dict)  # environment
    versions: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)  # what cannot be imported or used, and why
    gpus: tuple[tuple[str, str], ...] = ()  # (UUID, name) of those that it sees
    shm: tuple[int, int] = (0, 0)  # bytes of /dev/shm, and those that are free


def gather(rank: int, library: str) -> Facts:
    """Of this process. Imports torch. Independent."""
    versions = {"mpidp": mpidp.__version__, "python": platform.python_version(), "MPI": library}
    broken, gpus = {}, []
    for name in ("torch", "numpy", "h5py", "mpi4py"):
        try:
            module: Any = importlib.import_module(name)
            versions[name] = str(module.__version__)
            if name == "torch" and module.cuda.is_available():
                name = "torch.cuda"  # that may fail too
                seen = [module.cuda.get_device_properties(index) for index in range(module.cuda.device_count())]
                gpus = [(str(one.uuid), str(one.name)) for one in seen]
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}"
    threads = {name: os.environ[name] for name in THREADS if name in os.environ}
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return Facts(rank, socket.gethostname(), cores, os.cpu_count() or 1, threads, versions, broken, tuple(gpus), shared_memory())


def shared_memory() -> tuple[int, int]:
    """(bytes, those that are free) of /dev/shm; 0 without one. Independent."""
    with suppress(OSError):
        told = os.statvfs(SHARED_MEMORY)
        return told.f_blocks * told.f_frsize, told.f_bavail * told.f_frsize
    return 0, 0


def nodes(facts: Sequence[Facts]) -> dict[str, list[Facts]]:
    """Ranks by host, in order. Pure."""
    found: dict[str, list[Facts]] = {}
    for one in facts:
        found.setdefault(one.host, []).append(one)
    return found

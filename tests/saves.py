"""Write checkpoints in tests without a run."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpi4py import MPI

from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.saver import Saver
from mpidp.checkpoint.writer import THREAD


def saver_of(comm: MPI.Intracomm, run: Path, keep: int = 3, nodes: int = 0, every: int = 1, **more: Any) -> Saver:
    """Return a saver for ranks on `nodes` nodes of equal size; 0: one node per rank. The last rank may hold entries of its own.
    Collective over comm."""
    a_node = comm.size // (nodes or comm.size)
    node, place = divmod(comm.rank, a_node)
    return Saver(comm, run, every, keep, None if place else (node, comm.size // a_node), alone=comm.rank == comm.size - 1, **more)


def save(run: Path, step: int, entries: Mapping[str, Entry], meta: Mapping[str, Any], comm: MPI.Intracomm, keep: int) -> Path:
    """Write a checkpoint with one file per rank; it exists when this returns. Collective over comm."""
    saver = saver_of(comm, run, keep)
    saver.begin(step, entries, meta, wait=True)
    saver.wait_for_save(must=True)
    return run / "checkpoints" / f"step_{step:08d}"


def no_thread_is_left(seconds: float = 60.0) -> None:
    """Wait for the savers of jobs that failed in this process. (If a process fails, its savers end with it.) Independent."""
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(seconds)
            assert not thread.is_alive(), "a save did not end"

"""Replaces a failed rank by a new process. The new process runs the job's command again, and joins the other ranks in one
communicator.

The MPI calls that add a process wait for all ranks, without a time limit. Therefore only rank 0 starts the process. Before each
collective call, the ranks agree that all are present. The call then runs in a thread with a time limit. If a rank fails
meanwhile, only the attempt to add a rank fails, and not the job.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpi4py import MPI

from mpidp.runtime.environment import launched_with_ulfm
from mpidp.runtime.log import log
from mpidp.runtime.ulfm import agree, revocable

OPTION = "state_base_recoverable"  # with this option, mpirun continues after a rank has failed
LAUNCH = f"mpirun --with-ft ulfm --prtemca {OPTION} 1 --mca coll ^han,adapt"
START_SECONDS = 40.0  # time limit for a process to start and connect, which happens before its slow imports
CONNECT_SECONDS = 20.0  # time limit for a collective call, which takes milliseconds if no rank fails


def obstacle_to_respawn(machines: int) -> str:
    """Return the reason why this job cannot replace failed ranks, or "" if it can. `machines`: the number of machines of the job.
    Independent."""
    if not launched_with_ulfm():
        return "without ULFM, a failed rank ends the job"
    if machines > 1:
        return f"on {machines} machines, Open MPI 5.0 cannot connect a second replacement rank to the first replacement rank"
    if not any(OPTION.encode() in text for text in _ancestor_texts()):
        return f"mpirun was started without {OPTION}, and would exit with an error code after a rank has failed"
    return ""


def _ancestor_texts() -> list[bytes]:
    """Return the command line and the environment of each ancestor of this process. One of the ancestors is mpirun or its
    daemon."""
    found, pid = [], os.getppid()
    with suppress(OSError, IndexError, ValueError):  # processes of other users cannot be read
        while pid > 1:
            found += [Path(f"/proc/{pid}/{what}").read_bytes() for what in ("cmdline", "environ")]
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def add_rank(world: MPI.Intracomm, message: Any, alive: Callable[[], None]) -> MPI.Intracomm | None:
    """Start a new rank, and send it the `message` of rank 0. Return a communicator of the ranks of `world`, followed by the new
    rank. If this fails, return None. `alive`: a function that is called repeatedly during the wait. Collective over world."""
    pair = _with_timeout(_start, START_SECONDS, alive) if world.rank == 0 else MPI.COMM_SELF
    if not agree(world, pair is not None):
        return None
    inter = _with_timeout(lambda late: _bridge(world, pair), CONNECT_SECONDS, alive)
    if not agree(world, inter is not None):
        return None
    larger = _with_timeout(lambda late: inter.Merge(high=False), CONNECT_SECONDS, alive)
    if not agree(world, larger is not None):
        return None
    return larger if _broadcast(revocable(larger), message) is not None else None


def join() -> tuple[MPI.Intracomm, Any]:
    """Join the job. Only a new process calls this function. Return (communicator of all ranks, rank 0's message).

    If this fails, the process kills itself. Collective over all ranks."""
    try:
        parent = MPI.Comm.Get_parent()
        pair = parent.Merge(high=True)
        parent.Disconnect()
        world = revocable(MPI.COMM_SELF.Create_intercomm(0, pair, 0).Merge(high=True))
        message = _broadcast(world, None)
    except MPI.Exception:
        message = None
    if message is None:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.alarm(0)  # cancel the alarm that is_replacement_rank() has set
    return world, message


def _start(late: threading.Event) -> MPI.Intracomm:
    """Start a new process with this rank's command line. Return a communicator of this rank and the new process. `late`: an event
    that is set when the time limit has passed. Independent."""
    # OVERSUBSCRIBE is needed because mpirun does not release the slot of a failed rank.
    info = MPI.Info.Create({"wdir": os.getcwd(), "PMIX_BINDTO": "none", "PMIX_MAPBY": "slot:OVERSUBSCRIBE"})
    parent = MPI.COMM_SELF.Spawn(sys.executable, sys.orig_argv[1:], 1, info)
    if late.is_set():  # the time limit has passed; the new process finds no other rank and exits
        raise MPI.Exception(MPI.ERR_SPAWN)
    pair = parent.Merge(high=False)
    parent.Disconnect()
    return pair


def _bridge(world: MPI.Intracomm, pair: MPI.Intracomm) -> MPI.Intercomm:
    """Return an intercommunicator between `world` and the new process. `pair`: on rank 0, a communicator of rank 0 and the new
    process. Collective over world."""
    duplicate = world.Dup()
    try:
        return duplicate.Create_intercomm(0, pair, 1)
    except MPI.Exception:  # only rank 0 detects that the new process has failed
        duplicate.Revoke()
        raise


def _broadcast(world: MPI.Intracomm, message: Any) -> Any:
    """Send rank 0's message to all ranks, and return it. If this fails, return None on all ranks. Collective over world."""
    received = None
    if agree(world, True):
        try:
            received = world.bcast(message)
        except MPI.Exception:
            world.Revoke()
    return received if agree(world, received is not None) else None


def _with_timeout(call: Callable[[threading.Event], Any], seconds: float, alive: Callable[[], None]) -> Any:
    """Run `call` in a thread and return its result. Return None if `call` fails or takes longer than `seconds`. After a
    timeout, the thread keeps running. `call` gets an event, which is set when the time limit has passed or `call` has ended.
    `alive`: a function that is called repeatedly during the wait."""
    found: list[Any] = []
    late = threading.Event()

    def run() -> None:
        try:
            found.append(call(late))
        except MPI.Exception as failure:
            log.warning("warning: an attempt to replace a failed rank has failed: %s", failure)
            found.append(None)

    threading.Thread(target=run, name="respawn", daemon=True).start()
    end = time.monotonic() + seconds
    while not found and time.monotonic() < end:
        time.sleep(0.002)
        alive()
    late.set()
    return found[0] if found else None

"""A new process in the place of a rank that died: the launcher starts the job's own command once more, and both sides meet in
one communicator.

What MPI has for this waits for everybody and for ever. So rank 0 alone has the process started; whatever all must call comes
after an agreement that all are there, runs in a thread, and is waited for so long and no longer: who dies costs the attempt.
Each new process is a job of its own to the launcher: those started by one call were not told of each other's deaths.
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
from mpidp.runtime.ulfm import agree, revocable

OPTION = "state_base_recoverable"
LAUNCH = f"mpirun --with-ft ulfm --prtemca {OPTION} 1 --mca coll ^han,adapt"
START_SECONDS = 40.0  # for a process to start: it comes before it imports what is slow
MEET_SECONDS = 20.0  # for a call that all are about to make: milliseconds where nobody dies


def obstacle_to_respawn(machines: int) -> str:
    """Why a job on so many machines cannot replace ranks that die; nothing where it can. Independent."""
    if not launched_with_ulfm():
        return "here a rank that dies ends the job"
    if machines > 1:
        return f"on {machines} machines a second new rank does not reach the first (Open MPI 5.0)"
    if not any(OPTION.encode() in words for words in _launchers_words()):
        return "mpirun's exit code would be that of a failure"
    return ""


def _launchers_words() -> list[bytes]:
    """Command lines and environments of this process's ancestors: mpirun, or its daemon, is one."""
    found, pid = [], os.getppid()
    with suppress(OSError, IndexError, ValueError):  # of another user
        while pid > 1:
            found += [Path(f"/proc/{pid}/{what}").read_bytes() for what in ("cmdline", "environ")]
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def add_rank(world: MPI.Intracomm, message: Any, alive: Callable[[], None]) -> MPI.Intracomm | None:
    """The ranks of world in their order, and after them a new one, which holds rank 0's message. None when that failed: world is
    what it was, unless somebody died. alive: called all the time. Collective over world."""
    pair = _with_timeout(_start, START_SECONDS, alive) if world.rank == 0 else MPI.COMM_SELF
    if not agree(world, pair is not None):
        return None
    inter = _with_timeout(lambda late: _bridge(world, pair), MEET_SECONDS, alive)
    if not agree(world, inter is not None):
        return None
    larger = _with_timeout(lambda late: inter.Merge(high=False), MEET_SECONDS, alive)
    if not agree(world, larger is not None):
        return None
    return larger if _broadcast(revocable(larger), message) is not None else None


def join() -> tuple[MPI.Intracomm, Any]:
    """The new process's side of it: (all ranks, the message). Where they do not meet the process is gone. Collective over those
    whom it joins."""
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
    signal.alarm(0)  # set by is_replacement_rank
    return world, message


def _start(late: threading.Event) -> MPI.Intracomm:
    """This rank and a new process, started by the command line of this one. Independent."""
    info = MPI.Info.Create({"wdir": os.getcwd(), "PMIX_BINDTO": "none", "PMIX_MAPBY": "slot:OVERSUBSCRIBE"})  # no slot gets free
    parent = MPI.COMM_SELF.Spawn(sys.executable, sys.orig_argv[1:], 1, info)
    if late.is_set():  # it will find nobody, and leave
        raise MPI.Exception(MPI.ERR_SPAWN)
    pair = parent.Merge(high=False)
    parent.Disconnect()
    return pair


def _bridge(world: MPI.Intracomm, pair: MPI.Intracomm) -> MPI.Intercomm:
    """Between world and the new process. pair: on rank 0, the two of them. Collective over world."""
    ours = world.Dup()
    try:
        return ours.Create_intercomm(0, pair, 1)
    except MPI.Exception:  # rank 0 alone sees that the new one is dead
        ours.Revoke()
        raise


def _broadcast(world: MPI.Intracomm, message: Any) -> Any:
    """Rank 0's message on all, or None on all. Collective over world."""
    told = None
    if agree(world, True):
        try:
            told = world.bcast(message)
        except MPI.Exception:
            world.Revoke()
    return told if agree(world, told is not None) else None


def _with_timeout(call: Callable[[threading.Event], Any], seconds: float, alive: Callable[[], None]) -> Any:
    """What the call gives; None when it fails or has not returned by then: its thread stays behind, and finds its event set."""
    found: list[Any] = []
    late = threading.Event()

    def run() -> None:
        try:
            found.append(call(late))
        except MPI.Exception as failure:
            print(f"warning: {failure}", file=sys.stderr, flush=True)
            found.append(None)

    threading.Thread(target=run, name="respawn", daemon=True).start()
    end = time.monotonic() + seconds
    while not found and time.monotonic() < end:
        time.sleep(0.002)
        alive()
    late.set()
    return found[0] if found else None

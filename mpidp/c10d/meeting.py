"""Registration with torch.distributed: the `mpi://` rendezvous, the creation of groups, and the end of the process.

Ranks and sizes come from MPI. Each group gets its own communicator, which is made from world(). torch's functional collectives
call the group's methods, except for all_gather_into_tensor_out, which calls the C++ base class instead. For this collective,
this file registers a kernel that calls the group's method.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from mpi4py import MPI
from torch import distributed

from mpidp.c10d.base import NAME
from mpidp.c10d.group import MpiGroup
from mpidp.comm.store import open_store

dist: Any = distributed  # typed as Any: torch's type stubs are incomplete
distributed_c10d: Any = distributed.distributed_c10d
MEETING_TIMEOUT = timedelta(minutes=30)
PAUSE_SECONDS = 0.3  # pause before Abort, so that mpirun can forward the last output
HOST = "MPIDP_C10D_HOST"  # name or address of rank 0's host, if other nodes cannot reach it by its host name
WAIT = "MPIDP_C10D_WAIT"  # "block" or "poll"; default: block if all ranks of the group are on one node and each has a core
_world: MPI.Intracomm | None = None
_server: Any = None  # keeps rank 0's store alive until the next rendezvous
_library: Any = None
_failed = False


def use(comm: MPI.Intracomm) -> None:
    """Make later groups from `comm` instead of COMM_WORLD. For example, `comm` may contain the ranks that remain after a
    failure. Independent."""
    global _world
    _world = comm


def world() -> MPI.Intracomm:
    """Return the communicator from which groups are made. Independent."""
    if _world is not None:
        return _world
    if not MPI.Is_initialized() or MPI.COMM_WORLD.size == 1:
        from mpidp.runtime.world import start_mpi

        return start_mpi()
    return MPI.COMM_WORLD


def rendezvous(url: str, timeout: timedelta = MEETING_TIMEOUT, **_: Any) -> Iterator[tuple[Any, int, int]]:
    """Start a store on rank 0, and yield (store, rank, size). torch calls this function for init_method="mpi://". Collective
    over world().

    The store is a TCPStore on rank 0 at a free port (comm/store.py). Raises RuntimeError on all ranks if any rank cannot connect
    to the store.
    """
    global _server
    comm = world()
    try:
        store = open_store(comm, timeout, os.environ.get(HOST, ""))
    except RuntimeError as error:
        raise RuntimeError(f"mpi://: {error}. Set {HOST} to an address at which all nodes can reach rank 0's host") from error
    _server = store if comm.rank == 0 else None
    yield store, comm.rank, comm.size


def make_group(opts: Any, backend_options: Any = None) -> MpiGroup:
    """Create a process group when torch needs one. Collective over the ranks of the new group. `opts`: torch's description of the
    group.

    Raises RuntimeError if torch was initialized with another rank than MPI reports.
    """
    comm, ranks = world(), list(opts.global_ranks_in_group)
    ranks = ranks or list(range(opts.group_size))
    if comm.rank != ranks[opts.group_rank] or max(ranks) >= comm.size:
        raise RuntimeError(
            f"mpi4py: torch was initialized as rank {ranks[opts.group_rank]}, but MPI reports rank {comm.rank} of {comm.size}. "
            'Start the program with mpirun or srun, and pass init_method="mpi://"'
        )
    members = comm.Get_group()
    chosen = members.Incl(ranks)
    made = comm.Create_group(chosen, zlib.crc32(str(opts.group_id).encode()) % 32768)
    chosen.Free()
    members.Free()
    _prepare()
    return MpiGroup(made, opts.timeout, str(opts.group_id), opts.store, _blocking(made))


def _blocking(comm: MPI.Intracomm) -> bool:
    """Return whether the ranks of `comm` may use MPI's blocking calls, which keep a core busy while they wait. All ranks get the
    same result. Collective over comm."""
    rows = comm.allgather((socket.gethostname(), sorted(os.sched_getaffinity(0)), os.environ.get(WAIT, "")))
    choices = {choice for _, _, choice in rows if choice}
    if choices:
        return choices == {"block"}
    cores = {core for _, allowed, _ in rows for core in allowed}
    return len({host for host, _, _ in rows}) == 1 and comm.size <= len(cores) and MPI.Query_thread() == MPI.THREAD_MULTIPLE


def _all_gather_out(input: torch.Tensor, group_size: int, group_name: Any, *, out: torch.Tensor) -> torch.Tensor:
    group = distributed_c10d._resolve_process_group(group_name)
    if isinstance(group, MpiGroup):
        work: Any = group.all_gather_single(out, input.contiguous())
    else:
        work = dist.all_gather_into_tensor(out, input, group=group, async_op=True)
    torch._C._distributed_c10d._register_work(out, work)
    return out


def _prepare() -> None:
    """Register the kernel of all_gather_into_tensor_out and the exit handlers. Only the first call has an effect."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("_c10d_functional", "IMPL")
    for device in ("CPU", "CUDA"):
        _library.impl("all_gather_into_tensor_out", _all_gather_out, device)
    _notice_failure()
    atexit.register(_leave)


def _notice_failure() -> None:
    before = sys.excepthook

    def noticed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        global _failed
        _failed = True  # do not abort here: torch's own hook still has to print the traceback
        before(kind, error, trace)

    sys.excepthook = noticed


def _leave() -> None:
    """Shut down the groups at the end of the process.

    After an uncaught error, abort all ranks, because MPI_Finalize could wait forever for ranks that wait for this rank. Also
    abort if a group's thread is still inside MPI because other ranks did not join a call.
    """
    groups = [group for group in distributed_c10d._world.pg_map if isinstance(group, MpiGroup)]
    for group in groups if not _failed else ():
        group.shutdown()
    stuck = any(group.comm != MPI.COMM_NULL for group in groups)
    if stuck and not _failed:
        print("mpi4py: other ranks did not join a call, so this rank aborts the job", file=sys.stderr)
    if MPI.COMM_WORLD.size > 1 and (stuck or _failed):
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(PAUSE_SECONDS)
        MPI.COMM_WORLD.Abort(1)


def register() -> None:
    """Register the backend "mpi4py" and the rendezvous mpi:// with torch.distributed. Independent."""
    dist.Backend.register_backend(NAME, make_group, extended_api=True, devices=["cpu", "cuda"])
    dist.register_rendezvous_handler("mpi", rendezvous)


__all__ = ["make_group", "register", "rendezvous", "use", "world"]

"""How a job's ranks become torch.distributed's: `init_method="mpi://"` says who is here, and every group is made of MPI's world.

Functional collectives find a group's calls through torch's own dispatch, but for one (all_gather_into_tensor_out), which torch
sends to the base class: it gets a kernel here.
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

dist: Any = distributed  # much of it is not in its stubs
distributed_c10d: Any = distributed.distributed_c10d
MEETING_TIMEOUT = timedelta(minutes=30)
PAUSE_SECONDS = 0.3  # for mpirun to pass on the last words before it is told to end
HOST = "MPIDP_C10D_HOST"  # rank 0's name or address for the others, where its host name does not lead there
WAIT = "MPIDP_C10D_WAIT"  # block or poll; by itself: block where all ranks of the group are on one node and have a core each
_world: MPI.Intracomm | None = None
_server: Any = None  # others may ask it until the next meeting
_library: Any = None
_failed = False


def use(comm: MPI.Intracomm) -> None:
    """Groups to come are made of this communicator instead of COMM_WORLD: for those who are left after a failure. Independent."""
    global _world
    _world = comm


def world() -> MPI.Intracomm:
    """Independent."""
    if _world is not None:
        return _world
    if MPI.COMM_WORLD.size == 1:
        from mpidp.runtime.world import start_mpi

        return start_mpi()
    return MPI.COMM_WORLD


def rendezvous(url: str, timeout: timedelta = MEETING_TIMEOUT, **_: Any) -> Iterator[tuple[Any, int, int]]:
    """(store, rank, size): torch's handler of mpi:// . The store is a TCPStore at rank 0, at a free port that MPI tells the
    others. RuntimeError on all ranks where they cannot reach it. Collective over the world."""
    global _server
    comm, here, failed = world(), socket.gethostname(), ""
    store: Any = None
    if comm.rank == 0:
        try:
            store = _server = dist.TCPStore("127.0.0.1", 0, None, True, timeout, wait_for_workers=False, multi_tenant=False)
        except RuntimeError as error:
            failed = str(error)
    there, host, port, failed = comm.bcast((here, os.environ.get(HOST, here), store.port if store else 0, failed), root=0)
    if comm.rank and not failed:
        try:
            store = dist.TCPStore("127.0.0.1" if there == here else host, port, None, False, timeout, wait_for_workers=False)
        except RuntimeError as error:
            failed = str(error)
    wrong = [f"rank {rank}: {words}" for rank, words in enumerate(comm.allgather(failed)) if words]
    if wrong:
        raise RuntimeError(f"mpi://: the store of rank 0 was not reached at {host}, port {port} ({HOST}= another): {wrong[0]}")
    yield store, comm.rank, comm.size


def make_group(opts: Any, backend_options: Any = None) -> MpiGroup:
    """torch's way to a group. Collective over its members alone."""
    comm, ranks = world(), list(opts.global_ranks_in_group)
    ranks = ranks or list(range(opts.group_size))
    if comm.rank != ranks[opts.group_rank] or max(ranks) >= comm.size:
        raise RuntimeError(
            f"mpi4py: torch was told that this is rank {ranks[opts.group_rank]}, and MPI that it is rank {comm.rank} of "
            f"{comm.size}: "
            'start it with mpirun or srun, and say init_method="mpi://"'
        )
    members = comm.Get_group()
    chosen = members.Incl(ranks)
    made = comm.Create_group(chosen, zlib.crc32(str(opts.group_id).encode()) % 32768)
    chosen.Free()
    members.Free()
    _prepare()
    return MpiGroup(made, opts.timeout, str(opts.group_id), opts.store, _blocking(made))


def _blocking(comm: MPI.Intracomm) -> bool:
    """May ranks spin in MPI's blocking calls? The same answer on all. Collective over comm."""
    said = os.environ.get(WAIT, "")
    rows = comm.allgather((socket.gethostname(), sorted(os.sched_getaffinity(0)), said))
    words = {word for _, _, word in rows if word}
    if words:
        return words == {"block"}
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
    """Once, when the first group is made."""
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
        _failed = True  # torch's own hook prints after this one: the end must wait
        before(kind, error, trace)

    sys.excepthook = noticed


def _leave() -> None:
    """At the end of the process. An error that nobody caught ends all ranks: MPI's own end would wait for those that wait for
    this one. Else threads leave MPI before it ends; where one cannot, since others did not come, the job ends here."""
    groups = [group for group in distributed_c10d._world.pg_map if isinstance(group, MpiGroup)]
    for group in groups if not _failed else ():
        group.shutdown()
    stuck = any(group.comm != MPI.COMM_NULL for group in groups)
    if stuck and not _failed:
        print("mpi4py: ends without ranks that did not come", file=sys.stderr)
    if MPI.COMM_WORLD.size > 1 and (stuck or _failed):
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(PAUSE_SECONDS)
        MPI.COMM_WORLD.Abort(1)


def register() -> None:
    """torch.distributed learns of the backend and of mpi:// . Independent."""
    dist.Backend.register_backend(NAME, make_group, extended_api=True, devices=["cpu", "cuda"])
    dist.register_rendezvous_handler("mpi", rendezvous)


__all__ = ["make_group", "register", "rendezvous", "use", "world"]

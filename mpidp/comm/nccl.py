"""Exchanges gradients between GPUs with NCCL. MPI sets up torch's NCCL process group, and sends all other data.

The reducer `tree` works as it does with MPI. Ranks exchange pieces of their partial sums, add them with torch in the tree's
order, and exchange the sums. An exchange is a group of NCCL sends and receives, like NCCL's own all-to-all. The reducer
`allreduce` uses NCCL's allreduce. The host does not wait for exchanges. They run in order with the other work on the device's
current stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from mpi4py import MPI

from mpidp.comm.probe import gradient_path
from mpidp.comm.store import open_store
from mpidp.comm.transport import Messages, RankParts
from mpidp.comm.waiting import Wait
from mpidp.errors import MpidpError, UsageError
from mpidp.runtime.environment import launched_with_ulfm
from mpidp.runtime.topology import Topology
from mpidp.runtime.world import polite_barrier, raise_together

CONNECT_SECONDS = 60  # timeout for connecting to rank 0's store
EXCHANGE_SECONDS = 600  # timeout of an exchange; run.hang_seconds is shorter, so the watchdog reports missing ranks first


class Nccl(Messages):
    """Exchanges tensors with NCCL between ranks that share no memory. A process can have only one Nccl object, because it uses
    torch's default process group. Collective over comm."""

    in_thread = False  # reductions use the same stream as computation, so a thread could not overlap them

    def __init__(self, device: torch.device, comm: MPI.Intracomm, backend: str = "nccl") -> None:
        """Connect the ranks of `comm`. `backend`: the torch.distributed backend, for example "gloo" for CPU tensors. Raises
        MpidpError if the ranks cannot connect. Collective over comm."""
        super().__init__(device, backend)
        self._comm = comm
        from torch import distributed

        self._torch = distributed
        store: Any = None
        failed = ""
        try:
            store = open_store(comm, timedelta(seconds=CONNECT_SECONDS))
        except RuntimeError as error:  # on every rank
            failed = str(error)
        with self._together():
            if failed:
                raise RuntimeError(failed)
            self._connect(store)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Return a context manager. If its body fails on any rank, every rank raises MpidpError when it leaves the body.
        Collective over comm."""
        with raise_together(self._comm):
            try:
                yield
            except RuntimeError as error:
                raise MpidpError(
                    f"comm.gpu={self.mode}: the ranks could not connect ({str(error).splitlines()[0]}). Set "
                    "NCCL_SOCKET_IFNAME to the network interface, set NCCL_DEBUG=INFO for details, or use comm.gpu=auto, which "
                    "does not need NCCL"
                ) from error

    def _connect(self, store: Any) -> None:
        """Connect all ranks through the store, and test the connection by summing a number over all ranks. Raises RuntimeError if
        the sum is wrong. Collective over comm, without MPI."""
        self._torch.init_process_group(
            self.mode, store=store, rank=self._comm.rank, world_size=self._comm.size,
            timeout=timedelta(seconds=EXCHANGE_SECONDS), device_id=self.device if self.device.type == "cuda" else None,
        )
        one = torch.ones(1, device=self.device)
        self._torch.all_reduce(one)
        if int(one) != self._comm.size:
            raise RuntimeError(f"a test sum of {self._comm.size} ones gave {float(one)}")

    def load(self, piece: torch.Tensor, key: object) -> torch.Tensor:
        return piece

    def ready(self) -> None:
        """Do nothing. NCCL operations run in stream order, so there is nothing to wait for."""

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def alltoallv(self, comm: MPI.Intracomm, wait: Wait, source: RankParts, target: RankParts) -> None:
        self._exchange(_by_rank(source), _by_rank(target))

    def allgatherv(self, comm: MPI.Intracomm, wait: Wait, whole: RankParts) -> None:
        parts = _by_rank(whole)
        mine = parts.pop(comm.rank, None)
        self._exchange({} if mine is None else {rank: mine for rank in range(comm.size) if rank != comm.rank}, parts)

    def allreduce(self, comm: MPI.Intracomm, wait: Wait, wire: torch.Tensor, blocking: bool) -> None:
        self._torch.all_reduce(wire)
        self.sent_bytes += 2 * wire.nbytes * (comm.size - 1) // comm.size

    def _exchange(self, sends: dict[int, torch.Tensor], takes: dict[int, torch.Tensor]) -> None:
        """Send sends[rank] to each rank in `sends`. Meanwhile, receive takes[rank] from each rank in `takes`."""
        steps = [self._torch.P2POp(self._torch.isend, part, rank) for rank, part in sends.items()]
        steps += [self._torch.P2POp(self._torch.irecv, part, rank) for rank, part in takes.items()]
        for work in self._torch.batch_isend_irecv(steps) if steps else ():
            work.wait()
        self.sent_bytes += sum(part.nbytes for part in sends.values())

    def close(self) -> None:
        self._torch.destroy_process_group()
        polite_barrier(self._comm)  # rank 0 runs the store, and other ranks may use the store until here


def _by_rank(parts: RankParts) -> dict[int, torch.Tensor]:
    """Return {rank: its range of the tensor}, without empty ranges. Pure."""
    tensor, lengths, starts = parts
    flat = tensor.view(-1)
    return {rank: flat[at : at + n] for rank, (n, at) in enumerate(zip(lengths, starts, strict=True)) if n}


def open_transport(wanted: str, device: torch.device, comm: MPI.Intracomm) -> Messages:
    """Open the transport that comm.gpu=`wanted` selects, and return it. Collective over comm."""
    path = gradient_path(wanted, device, comm)
    return Nccl(device, comm) if path == "nccl" else Messages(device, path)


def check_nccl(wanted: str, device: torch.device, mesh: Topology) -> None:
    """Raise UsageError on every rank if comm.gpu=nccl cannot work. Collective over mesh.dp."""
    if wanted != "nccl":
        return
    with raise_together(mesh.dp):
        if launched_with_ulfm():
            raise UsageError(
                "comm.gpu=nccl does not support recovery from failed ranks. Start mpirun without --with-ft ulfm, or use "
                "comm.gpu=auto. Without --with-ft ulfm, a failed rank ends the job, and the same command resumes it"
            )
        if device.type != "cuda":
            raise UsageError(
                f"comm.gpu=nccl, but on {mesh.host} this rank would train on the CPU. Give every rank a GPU, "
                "or use comm.gpu=auto. To see why no GPU is used, set train.device=cuda"
            )
        if not has_nccl():
            raise UsageError(
                f"comm.gpu=nccl, but torch {torch.__version__} on {mesh.host} was built without NCCL. Install a CUDA build of "
                "torch for Linux, or use comm.gpu=auto"
            )
    if shared := shared_gpus(mesh.dp.allgather((mesh.host.partition("#")[0], gpu_name(device)))):
        raise UsageError.on_every_rank(
            f"comm.gpu=nccl, but {'; '.join(shared)}, and NCCL supports one rank per GPU. Start at most one rank per GPU, make a "
            "different GPU visible to each rank, or use comm.gpu=auto"
        )


def has_nccl() -> bool:
    """Return whether torch has NCCL. Independent."""
    from torch import distributed

    return distributed.is_available() and distributed.is_nccl_available()


def gpu_name(device: torch.device) -> str:
    """Return a name of the GPU that is unique on its host. It contains the GPU's UUID, because GPU numbers depend on which GPUs a
    rank sees. Independent."""
    return f"GPU {torch.cuda.get_device_properties(device).uuid}"


def shared_gpus(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return a list with one warning text for each GPU that several ranks share. `rows`: (host, name of the GPU) of each rank, in
    order of ranks. Pure."""
    users: dict[tuple[str, str], list[str]] = {}
    for rank, row in enumerate(rows):
        users.setdefault(row, []).append(str(rank))
    return [f"ranks {', '.join(ranks)} share {gpu} on {host}" for (host, gpu), ranks in users.items() if len(ranks) > 1]

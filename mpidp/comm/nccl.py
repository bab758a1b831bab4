"""Gradients of GPUs from GPU to GPU without MPI: torch's own NCCL process group, which MPI brings together.

The reducer `tree` stays what it is: ranks send each other the parts of their nodes, add them in the tree's order with torch, and
send the sums: by NCCL's sends and receives, grouped, of which its all-to-all is made too. `allreduce` is NCCL's own sum. Nothing
waits on the host: exchanges are in order with other work of the device's current stream. All else stays with MPI.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from mpi4py import MPI

from mpidp.comm.probe import gradient_path
from mpidp.comm.transport import Messages, RankParts
from mpidp.comm.waiting import Wait
from mpidp.errors import MpidpError, UsageError
from mpidp.runtime.environment import launched_with_ulfm
from mpidp.runtime.topology import Topology
from mpidp.runtime.world import polite_barrier, raise_together

MEETING_SECONDS = 60  # for ranks to reach the first
EXCHANGE_SECONDS = 600  # then torch ends the process; run.hang_seconds is sooner, and says who is missing


class Nccl(Messages):
    """Between ranks that are groups of one. It takes torch's default process group, of which a process has one at a time. What
    exchanges is Collective over comm."""

    in_thread = False  # the stream that reduces is the one that computes: a thread would hide nothing

    def __init__(self, device: torch.device, comm: MPI.Intracomm, backend: str = "nccl") -> None:
        """backend: of torch.distributed; gloo is the same on the CPU. MpidpError where ranks cannot reach each other. Collective
        over comm."""
        super().__init__(device, backend)
        self._comm = comm
        from torch import distributed

        self._torch = distributed
        here, store = socket.gethostname(), None
        with self._together("nowhere"):
            if comm.rank == 0:
                store = self._store("127.0.0.1", 0)
        there, port = comm.bcast((here, store.port) if store is not None else None, root=0)
        with self._together(f"at {there}, port {port}"):
            store = store or self._store("127.0.0.1" if there == here else there, port)
        with self._together(f"at {there}, port {port}"):  # once all can
            self._meet(store)

    @contextmanager
    def _together(self, where: str) -> Iterator[None]:
        """Collective over comm."""
        with raise_together(self._comm):
            try:
                yield
            except RuntimeError as error:
                raise MpidpError(
                    f"comm.gpu={self.mode}: the ranks did not meet {where}: {str(error).splitlines()[0]}. NCCL_SOCKET_IFNAME "
                    "names the network interface to use, NCCL_DEBUG=INFO says more; comm.gpu=auto does without NCCL"
                ) from error

    def _store(self, host: str, port: int) -> Any:
        """Where ranks find each other's addresses; port 0: it is here, at a free port."""
        return self._torch.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=port == 0, timeout=timedelta(seconds=MEETING_SECONDS), wait_for_workers=False
        )

    def _meet(self, store: Any) -> None:
        """Connections are made, and tried by a sum, now rather than in step 1. It takes all ranks, but not MPI."""
        self._torch.init_process_group(
            self.mode, store=store, rank=self._comm.rank, world_size=self._comm.size,
            timeout=timedelta(seconds=EXCHANGE_SECONDS), device_id=self.device if self.device.type == "cuda" else None,
        )
        one = torch.ones(1, device=self.device)
        self._torch.all_reduce(one)
        if int(one) != self._comm.size:
            raise RuntimeError(f"the sum of {self._comm.size} ones came out as {float(one)}")

    def load(self, piece: torch.Tensor, key: object) -> torch.Tensor:
        return piece

    def ready(self) -> None:
        """Streams are in order by themselves."""

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
        """Tensors to and from ranks, all under way at once; a rank may have none."""
        steps = [self._torch.P2POp(self._torch.isend, part, rank) for rank, part in sends.items()]
        steps += [self._torch.P2POp(self._torch.irecv, part, rank) for rank, part in takes.items()]
        for work in self._torch.batch_isend_irecv(steps) if steps else ():
            work.wait()
        self.sent_bytes += sum(part.nbytes for part in sends.values())

    def close(self) -> None:
        self._torch.destroy_process_group()
        polite_barrier(self._comm)  # rank 0 has the store, which others may use until here


def _by_rank(parts: RankParts) -> dict[int, torch.Tensor]:
    """Those that are not empty. Pure."""
    tensor, lengths, starts = parts
    flat = tensor.view(-1)
    return {rank: flat[at : at + n] for rank, (n, at) in enumerate(zip(lengths, starts, strict=True)) if n}


def open_transport(wanted: str, device: torch.device, comm: MPI.Intracomm) -> Messages:
    """For comm.gpu=wanted. Collective over comm."""
    path = gradient_path(wanted, device, comm)
    return Nccl(device, comm) if path == "nccl" else Messages(device, path)


def check_nccl(wanted: str, device: torch.device, mesh: Topology) -> None:
    """UsageError on every rank where comm.gpu=nccl cannot be had. Collective over mesh.dp."""
    if wanted != "nccl":
        return
    with raise_together(mesh.dp):
        if launched_with_ulfm():
            raise UsageError(
                "comm.gpu=nccl, but mpirun was told to let the job outlive its ranks, and NCCL's connections do not survive a "
                "dead one: start without --with-ft ulfm (a dead rank then ends the job, which resumes), or use comm.gpu=auto"
            )
        if device.type != "cuda":
            raise UsageError(
                f"comm.gpu=nccl, but on {mesh.host} this rank would train on the CPU: see that every rank is given a GPU "
                "(train.device=cuda says why one is not), or use comm.gpu=auto"
            )
        if not has_nccl():
            raise UsageError(
                f"comm.gpu=nccl, but torch {torch.__version__} on {mesh.host} was built without NCCL: install a CUDA build of "
                "torch for Linux, or use comm.gpu=auto"
            )
    if shared := shared_gpus(mesh.dp.allgather((mesh.host.partition("#")[0], gpu_name(device)))):
        raise UsageError.on_every_rank(
            f"comm.gpu=nccl, but {'; '.join(shared)}, and NCCL takes one rank a GPU: start no more ranks on a node than it has "
            "GPUs, see that each is shown another one, or use comm.gpu=auto"
        )


def has_nccl() -> bool:
    """Independent."""
    from torch import distributed

    return distributed.is_available() and distributed.is_nccl_available()


def gpu_name(device: torch.device) -> str:
    """By its UUID, which tells GPUs apart also where each rank sees one alone, as number 0. Independent."""
    return f"GPU {torch.cuda.get_device_properties(device).uuid}"


def shared_gpus(rows: Sequence[tuple[str, str]]) -> list[str]:
    """In words, GPUs on which several ranks are; rows: (host, GPU) of each rank. Pure."""
    users: dict[tuple[str, str], list[str]] = {}
    for rank, row in enumerate(rows):
        users.setdefault(row, []).append(str(rank))
    return [f"ranks {', '.join(ranks)} share {gpu} on {host}" for (host, gpu), ranks in users.items() if len(ranks) > 1]

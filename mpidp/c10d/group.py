"""The process group of the "mpi4py" backend: collectives, barriers and point-to-point messages."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from mpi4py import MPI

from mpidp.c10d.base import Tensors, as_list
from mpidp.c10d.calls import private_tag, receive, send
from mpidp.c10d.hosted import HostBuffer
from mpidp.c10d.monitored import monitored_barrier
from mpidp.c10d.moves import Moves
from mpidp.c10d.profiled import recorded
from mpidp.c10d.reductions import Reductions
from mpidp.c10d.works import Message, Promise


class MpiGroup(Reductions, Moves):
    """The "mpi4py" process group. send() and recv() are Collective over sender and receiver, other methods over the group."""

    def barrier(self, opts: object = None, timeout: timedelta | None = None) -> Promise:
        """Return a Work object that completes when all ranks have called barrier()."""
        seconds = opts if isinstance(opts, timedelta) else timeout
        return self._begin("barrier", self._calls.barrier, [], [], opts, seconds)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Wait until all ranks have called monitored_barrier(). Raises RuntimeError if a rank does not call it before the
        timeout.

        The error on rank 0 names the first missing rank, or all missing ranks if `wait_all_ranks` is true.
        """
        self._barriers += 1
        seconds = self.seconds if timeout is None else timeout.total_seconds()
        monitored_barrier(self.comm, self._barriers, seconds, wait_all_ranks, private_tag(2))

    def _message(self, requests: list[MPI.Request], hosted: HostBuffer, receives: bool, name: str,
                 record: Callable[[], None] | None) -> Promise:
        message = Message(requests, hosted, receives, name, self.seconds)
        message.record = record
        self._messages = [other for other in self._messages if not other.progress()]  # testing a request lets MPI make progress
        self._messages.append(message)
        if self._coalesced is not None:
            self._coalesced.append(message)
        return message

    def send(self, tensors: Tensors, dst: int, tag: int = 0) -> Promise:
        """Start sending a tensor to rank `dst`, and return a Work object. The tensor must not be overwritten before the work is
        complete."""
        hosted, record = self._hosted("send", tensors)
        return self._message(send(self.comm, hosted.load(), dst, tag), hosted, False, f"send to rank {dst}, tag {tag}", record)

    def recv(self, tensors: Tensors, src: int, tag: int = 0) -> Promise:
        """Start receiving a tensor from rank `src`, and return a Work object. The tensor must not be read before the work is
        complete."""
        hosted, record = self._hosted("recv", tensors)
        requests = receive(self.comm, hosted.empty(), src, tag)
        return self._message(requests, hosted, True, f"recv from rank {src}, tag {tag}", record)

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Promise:
        """Start receiving a tensor from any rank, and return a Work object. Its method source_rank() returns the sender."""
        hosted, record = self._hosted("recvAnySource", tensors)
        requests = receive(self.comm, hosted.empty(), MPI.ANY_SOURCE, tag)
        return self._message(requests, hosted, True, f"recv from any rank, tag {tag}", record)

    def _hosted(self, name: str, tensors: Tensors) -> tuple[HostBuffer, Callable[[], None] | None]:
        tensor = as_list(tensors)[0]
        return HostBuffer(tensor), recorded(f"{self.label}:{name}", [tensor])

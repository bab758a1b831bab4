"""The process group of backend "mpi4py": all calls, barriers, and messages from rank to rank."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from mpi4py import MPI

from mpidp.c10d.base import Tensors, several
from mpidp.c10d.calls import private_tag, send, take
from mpidp.c10d.hosted import Hosted
from mpidp.c10d.monitored import monitored_barrier
from mpidp.c10d.moves import Moves
from mpidp.c10d.profiled import recorded
from mpidp.c10d.reductions import Reductions
from mpidp.c10d.works import Message, Promise


class MpiGroup(Reductions, Moves):
    """Collective over the group, but for send and recv: Collective over the two."""

    def barrier(self, opts: object = None, timeout: timedelta | None = None) -> Promise:
        """Until all have come."""
        seconds = opts if isinstance(opts, timedelta) else timeout
        return self._begin("barrier", self._calls.barrier, [], [], opts, seconds)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier through rank 0, whose error names a rank that did not come; wait_all_ranks: all of them. RuntimeError."""
        self._barriers += 1
        seconds = self.seconds if timeout is None else timeout.total_seconds()
        monitored_barrier(self.comm, self._barriers, seconds, wait_all_ranks, private_tag(2))

    def _message(self, requests: list[MPI.Request], hosted: Hosted, taken: bool, name: str,
                 record: Callable[[], None] | None) -> Promise:
        message = Message(requests, hosted, taken, name, self.seconds)
        message.record = record
        self._open = [other for other in self._open if not other.look()]  # which moves them on, too
        self._open.append(message)
        if self._together is not None:
            self._together.append(message)
        return message

    def send(self, tensors: Tensors, dst: int, tag: int = 0) -> Promise:
        """Done when the tensor may be written again."""
        hosted, record = self._hosted("send", tensors)
        return self._message(send(self.comm, hosted.load(), dst, tag), hosted, False, f"send to rank {dst}, tag {tag}", record)

    def recv(self, tensors: Tensors, src: int, tag: int = 0) -> Promise:
        """Done when it is here."""
        hosted, record = self._hosted("recv", tensors)
        return self._message(take(self.comm, hosted.empty(), src, tag), hosted, True, f"recv from rank {src}, tag {tag}", record)

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Promise:
        """Of the first that comes; torch asks the work for its rank."""
        hosted, record = self._hosted("recvAnySource", tensors)
        requests = take(self.comm, hosted.empty(), MPI.ANY_SOURCE, tag)
        return self._message(requests, hosted, True, f"recv from any rank, tag {tag}", record)

    def _hosted(self, name: str, tensors: Tensors) -> tuple[Hosted, Callable[[], None] | None]:
        tensor = several(tensors)[0]
        return Hosted(tensor), recorded(f"{self.label}:{name}", [tensor])

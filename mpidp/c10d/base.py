"""The base class of the process group. The class answers torch's queries about the group, starts calls, and shuts the group
down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from mpi4py import MPI
from torch.distributed import DistBackendError, ProcessGroup, ReduceOp

from mpidp.c10d.calls import SMALL_BYTES, Calls
from mpidp.c10d.profiled import recorded
from mpidp.c10d.turns import Turns
from mpidp.c10d.works import Coalesced, Message, Promise, Queued

NAME = "mpi4py"
Tensors = torch.Tensor | Sequence[torch.Tensor]


def as_list(tensors: Tensors) -> list[torch.Tensor]:
    """Return the tensors as a list. A single tensor becomes a list of one. Pure."""
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def op_of(opts: Any) -> Any:
    """Return the ReduceOp in `opts`, or SUM if `opts` is None. opts: the options of a call, or a ReduceOp itself. Pure."""
    return getattr(opts, "reduceOp", ReduceOp.SUM if opts is None else opts)


def root_of(opts: Any) -> int:
    """Return the root rank in `opts`, or 0 if `opts` is None. opts: the options of a call, or a root rank itself. Pure."""
    return int(getattr(opts, "rootRank", opts or 0))


def check(valid: bool, name: str, message: str) -> None:
    """Raise ValueError, with `name` and `message` in its text, unless `valid` is true. Call this function before anything is
    sent, so that the group stays usable after the error. Pure."""
    if not valid:
        raise ValueError(f"mpi4py: {name}: {message}")


_ProcessGroup: Any = ProcessGroup  # typed as Any: Python methods cannot match the C++ overloads


class Base(_ProcessGroup):
    """A process group that owns its communicator. shutdown() is Collective over the group. The other methods are Independent."""

    def __init__(self, comm: MPI.Intracomm, timeout: timedelta, name: str, store: Any, blocking: bool) -> None:
        """Make a group that owns `comm`. `timeout`: the timeout of calls that specify none. `name`: the name of the group.
        `store`: a torch store that only this group uses, or None. `blocking`: the parameter of the same name of Calls."""
        super().__init__(comm.rank, comm.size)
        self.comm = comm
        self.store = store
        self.seconds = timeout.total_seconds()
        self._calls = Calls(comm, blocking)
        self._turns = Turns(self._calls, name, store)
        self._name, self._description = name, ""
        self._messages: list[Message] = []  # sends and receives; the list keeps their buffers alive
        self._coalesced: list[Promise] | None = None
        self._barriers = 0
        self._sequence = 0

    label = NAME  # prefix of the names of this group's calls in the profiler

    # torch's queries. The C++ base class would answer them from its Backend objects, but this group has no Backend objects.

    def getBackendName(self) -> str:
        return NAME

    def getRank(self) -> int:
        return int(self.comm.rank)

    def getSize(self) -> int:
        return int(self.comm.size)

    def setGroupName(self, name: str) -> None:
        self._name = self._turns.name = name

    def getGroupName(self) -> str:
        return self._name

    def setGroupDesc(self, description: str) -> None:
        self._description = description

    def getGroupDesc(self) -> str:
        return self._description

    def get_group_store(self) -> Any:
        return self.store

    def _get_backend(self, device: torch.device) -> Base:
        return self

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]

    supports_splitting = False
    supports_coalescing = False
    supports_time_estimate = False
    supports_shrinking = False

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return False

    def set_timeout(self, timeout: timedelta) -> None:
        self.seconds = timeout.total_seconds()

    _set_default_timeout = set_timeout

    def _set_sequence_number_for_group(self) -> None:
        self._sequence = 0

    setSequenceNumberForGroup = _set_sequence_number_for_group

    def _get_sequence_number_for_group(self) -> int:
        return self._sequence

    getSequenceNumberForGroup = _get_sequence_number_for_group

    def shutdown(self) -> None:
        """Wait for all started calls, then free the communicator. If a call has timed out, the communicator is not freed. Later
        calls of shutdown() do nothing."""
        if self.comm != MPI.COMM_NULL and self._turns.close() and all(message.close() for message in self._messages):
            self.comm.Free()

    def abort(self) -> None:
        """End the running and queued calls of this rank with an error. If the MPI library supports fault tolerance (ULFM), end
        the calls of all ranks of the group."""
        self._turns.abort(DistBackendError(f"mpi4py: group {self._name} was aborted"))
        with suppress(MPI.Exception, NotImplementedError):
            self.comm.Revoke()

    # Methods that start a call.

    def _seconds(self, opts: Any, timeout: timedelta | None = None) -> float:
        chosen = timeout or getattr(opts, "timeout", None)
        return chosen.total_seconds() if chosen and chosen.total_seconds() > 0 else self.seconds

    def _begin(self, name: str, work: Callable[[], None], inputs: list[torch.Tensor], result: Any, opts: Any,
               timeout: Any = None) -> Promise:
        """Queue the collective `work`, and return its Work object. `name`: torch's name of the call, perhaps followed by a space
        and details. `inputs`: the input tensors. `result`: the output tensors."""
        if self.comm == MPI.COMM_NULL:
            raise DistBackendError(f"mpi4py: {name}: group {self._name} was destroyed")
        self._sequence += 1
        small = not self._calls.blocking or sum(tensor.nbytes for tensor in inputs if not tensor.is_sparse) <= SMALL_BYTES
        queued = Queued(work, result, name, self._seconds(opts, timeout))
        queued.record = recorded(f"{self.label}:{name.partition(' ')[0]}", inputs)
        self._turns.submit(queued, at_once=small and not getattr(opts, "asyncOp", True))
        if self._coalesced is not None:
            self._coalesced.append(queued)
        return queued

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: torch.device) -> Promise:
        works, self._coalesced = self._coalesced or [], None
        return Coalesced(works)

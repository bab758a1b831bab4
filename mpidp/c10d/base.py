"""A process group as torch.distributed knows one: its names, its end, and how a call is begun."""

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
from mpidp.c10d.works import All, Message, Promise, Queued

NAME = "mpi4py"
Tensors = torch.Tensor | Sequence[torch.Tensor]


def several(tensors: Tensors) -> list[torch.Tensor]:
    """One tensor is a list of one. Pure."""
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def op_of(opts: Any) -> Any:
    """Pure."""
    return getattr(opts, "reduceOp", ReduceOp.SUM if opts is None else opts)


def root_of(opts: Any) -> int:
    """Pure."""
    return int(getattr(opts, "rootRank", opts or 0))


def check(right: bool, name: str, words: str) -> None:
    """ValueError on this rank, before anything is sent."""
    if not right:
        raise ValueError(f"mpi4py: {name}: {words}")


_ProcessGroup: Any = ProcessGroup  # whose overloads no method of Python's can repeat


class Base(_ProcessGroup):
    """Over a communicator of its own, which it frees. Independent, but for shutdown, which is Collective over the group."""

    def __init__(self, comm: MPI.Intracomm, timeout: timedelta, name: str, store: Any, blocking: bool) -> None:
        """timeout: of each call that has none of its own; store: of this group alone, or None."""
        super().__init__(comm.rank, comm.size)
        self.comm = comm
        self.store = store
        self.seconds = timeout.total_seconds()
        self._calls = Calls(comm, blocking)
        self._turns = Turns(self._calls, name, store)
        self._name, self._said = name, ""
        self._open: list[Message] = []  # their memory must live until they are done
        self._together: list[Promise] | None = None
        self._barriers = 0
        self._sequence = 0

    label = NAME  # of its calls in the profiler

    # What torch asks about it. The base class keeps this in its Backends, of which this group has none.

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

    def setGroupDesc(self, words: str) -> None:
        self._said = words

    def getGroupDesc(self) -> str:
        return self._said

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
        """Once all that was begun is done; its communicator is freed. A second time: nothing. A group in which a call was not
        done in time stays as it is."""
        if self.comm != MPI.COMM_NULL and self._turns.close() and all(message.settle() for message in self._open):
            self.comm.Free()

    def abort(self) -> None:
        """What is under way ends with an error, here and, where MPI can (ULFM), on the others."""
        self._turns.break_off(DistBackendError(f"mpi4py: group {self._name} was aborted"))
        with suppress(MPI.Exception, NotImplementedError):
            self.comm.Revoke()

    # How a call is begun.

    def _seconds(self, opts: Any, timeout: timedelta | None = None) -> float:
        said = timeout or getattr(opts, "timeout", None)
        return said.total_seconds() if said and said.total_seconds() > 0 else self.seconds

    def _begin(self, name: str, work: Callable[[], None], inputs: list[torch.Tensor], result: Any, opts: Any,
               timeout: Any = None) -> Promise:
        """name: what torch calls it, and more words after a space."""
        if self.comm == MPI.COMM_NULL:
            raise DistBackendError(f"mpi4py: {name}: group {self._name} was destroyed")
        self._sequence += 1
        small = not self._calls.blocking or sum(tensor.nbytes for tensor in inputs if not tensor.is_sparse) <= SMALL_BYTES
        queued = Queued(work, result, name, self._seconds(opts, timeout))
        queued.record = recorded(f"{self.label}:{name.partition(' ')[0]}", inputs)
        self._turns.submit(queued, at_once=small and not getattr(opts, "asyncOp", True))
        if self._together is not None:
            self._together.append(queued)
        return queued

    def _start_coalescing(self, device: torch.device) -> None:
        self._together = []

    def _end_coalescing(self, device: torch.device) -> Promise:
        works, self._together = self._together or [], None
        return All(works)

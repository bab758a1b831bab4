"""Collectives that move data without reducing it. Methods that torch.distributed has renamed are defined under both names. All
methods are Collective over the group."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

from mpidp.c10d.base import Base, Tensors, as_list, check, root_of
from mpidp.c10d.hosted import HostBuffer
from mpidp.c10d.works import Promise


class Moves(Base):
    """Broadcast, gather, scatter and all-to-all. Shapes and semantics are those of torch.distributed. Each method returns a Work
    object."""

    def broadcast(self, tensors: Tensors, opts: Any = None, timeout: timedelta | None = None) -> Promise:
        """Copy the tensors of the root into the tensors of the other ranks."""
        given, root = as_list(tensors), root_of(opts)
        hosted = [HostBuffer(tensor) for tensor in given]

        def work() -> None:
            for tensor in hosted:
                if self.comm.rank == root:
                    self._calls.bcast(tensor.load(), root)
                else:
                    self._calls.bcast(tensor.empty(), root)
                    tensor.store()

        return self._begin(f"broadcast from rank {root}", work, given, given, opts, timeout)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Promise:
        """Concatenate the inputs of all ranks in one output tensor."""
        return self.all_gather_single_coalesced([output], [input], opts)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Promise:
        """Run all_gather_single() for each input and output."""
        outs, ins = as_list(outputs), as_list(inputs)
        check(all(o.numel() == i.numel() * self.comm.size and o.dtype == i.dtype for o, i in zip(outs, ins, strict=True)),
               "all_gather", "the output must have the input's dtype, and as many elements as the inputs of all ranks together")
        pairs = [(HostBuffer(i), HostBuffer(o)) for i, o in zip(ins, outs, strict=True)]

        def work() -> None:
            for source, target in pairs:
                self._calls.allgather(source.load(), target.empty())
                target.store()

        return self._begin("all_gather", work, ins, outs, opts)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def allgather(self, outputs: Any, inputs: Tensors, opts: Any = None) -> Promise:
        """Gather each input from all ranks into a list of output tensors, one per rank. The sizes of the inputs may differ
        between ranks."""
        ins, lists = as_list(inputs), [outputs] if isinstance(inputs, torch.Tensor) else list(outputs)
        return self._gathered("all_gather", [list(row) for row in lists], ins, opts)

    def allgather_coalesced(self, output_lists: Any, inputs: Tensors, opts: Any = None) -> Promise:
        """Run allgather() for several inputs. `output_lists`: one list per rank. Each of these lists has one tensor per input."""
        return self._gathered("all_gather", [list(row) for row in zip(*output_lists, strict=True)], as_list(inputs), opts)

    def _gathered(self, name: str, lists: list[list[torch.Tensor]], ins: list[torch.Tensor], opts: Any) -> Promise:
        for row, tensor in zip(lists, ins, strict=True):
            check(len(row) == self.comm.size and {o.dtype for o in row} == {tensor.dtype}, name,
                   "the output list must have one tensor per rank, with the input's dtype")
            check(row[self.comm.rank].numel() == tensor.numel(), name,
                  "this rank's output must have as many elements as its input")
        rows = [([HostBuffer(o) for o in row], HostBuffer(i)) for row, i in zip(lists, ins, strict=True)]

        def work() -> None:
            for targets, source in rows:
                tensor, lengths = source.load(), [target.tensor.nbytes for target in targets]
                whole = torch.empty(sum(lengths), dtype=torch.uint8)
                if len(set(lengths)) == 1:
                    self._calls.allgather(tensor.view(-1).view(torch.uint8), whole)
                else:
                    self._calls.allgatherv(tensor, whole, lengths)
                unpack(whole, targets)

        return self._begin(name, work, ins, lists, opts)

    def gather(self, outputs: Any, inputs: Tensors, opts: Any = None, *, root: int | None = None) -> Promise:
        """Gather the inputs of all ranks into a list on the root."""
        source, at = HostBuffer(as_list(inputs)[0]), root_of(opts) if root is None else root
        is_root = self.comm.rank == at
        every = list(outputs if not outputs or isinstance(outputs[0], torch.Tensor) else outputs[0]) if is_root else []
        check(not is_root or len(every) == self.comm.size, "gather", "the root's output list must have one tensor per rank")
        check(all(o.numel() == source.tensor.numel() and o.dtype == source.tensor.dtype for o in every), "gather",
               "all tensors must have the same size and dtype")
        targets = [HostBuffer(o) for o in every]

        def work() -> None:
            tensor = source.load()
            whole = torch.empty(tensor.nbytes * self.comm.size, dtype=torch.uint8) if is_root else None
            self._calls.gather(tensor.view(-1).view(torch.uint8), whole, at)
            if whole is not None:
                unpack(whole, targets)

        return self._begin("gather", work, [source.tensor], [every], opts)

    def scatter(self, outputs: Tensors, inputs: Any, opts: Any = None, *, root: int | None = None) -> Promise:
        """Send the list of tensors on the root to the ranks, one tensor to each rank."""
        target, at = HostBuffer(as_list(outputs)[0]), root_of(opts) if root is None else root
        is_root = self.comm.rank == at
        every = list(inputs if not inputs or isinstance(inputs[0], torch.Tensor) else inputs[0]) if is_root else []
        check(not is_root or len(every) == self.comm.size, "scatter", "the root's input list must have one tensor per rank")
        check(all(i.numel() == target.tensor.numel() and i.dtype == target.tensor.dtype for i in every), "scatter",
               "all tensors must have the same size and dtype")
        sources = [HostBuffer(i) for i in every]

        def work() -> None:
            whole = torch.cat([source.load().view(-1) for source in sources]) if is_root else None
            self._calls.scatter(whole, target.empty(), at)
            target.store()

        return self._begin("scatter", work, every, [target.tensor], opts)

    def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor, output_splits: Any = (), input_splits: Any = (),
                          opts: Any = None) -> Promise:
        """Send a range of `input` to each rank, and store the received ranges in `output`, in order of their senders.

        `input_splits`, `output_splits`: the length of each range along dimension 0. If they are empty, all ranges have equal
        lengths.
        """
        source, target = HostBuffer(input), HostBuffer(output)
        sent, received = self._lengths(input, list(input_splits or ())), self._lengths(output, list(output_splits or ()))

        def work() -> None:
            self._calls.alltoall(source.load(), target.empty(), sent, received)
            target.store()

        return self._begin("all_to_all", work, [input], [output], opts)

    alltoall_base = all_to_all_single

    def _lengths(self, tensor: torch.Tensor, splits: list[int]) -> list[int]:
        """Return the size in bytes of each rank's range of the tensor. Raises ValueError if `splits` does not fit the tensor."""
        if not splits:
            check(tensor.dim() > 0 and tensor.shape[0] % self.comm.size == 0, "all_to_all",
                   "without splits, dimension 0 must be a multiple of the number of ranks")
            return [tensor.nbytes // self.comm.size] * self.comm.size
        check(len(splits) == self.comm.size and sum(splits) == tensor.shape[0], "all_to_all",
               "there must be one split size per rank, and they must add up to the size of dimension 0")
        row = tensor.nbytes // max(1, tensor.shape[0])
        return [length * row for length in splits]

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Promise:
        """Send inputs[r] to rank r, and receive outputs[r] from rank r, for every r."""
        sources, targets = [HostBuffer(i) for i in as_list(inputs)], [HostBuffer(o) for o in as_list(outputs)]
        check(len(sources) == len(targets) == self.comm.size, "all_to_all", "the lists must have one tensor per rank")
        lengths = [source.tensor.nbytes for source in sources], [target.tensor.nbytes for target in targets]

        def work() -> None:
            whole = torch.cat([source.load().view(-1).view(torch.uint8) for source in sources])
            got = torch.empty(sum(lengths[1]), dtype=torch.uint8)
            self._calls.alltoall(whole, got, *lengths)
            unpack(got, targets)

        return self._begin("all_to_all", work, as_list(inputs), [t.tensor for t in targets], opts)


def unpack(whole: torch.Tensor, targets: list[HostBuffer]) -> None:
    """Copy the bytes of `whole` into the targets, one target after the other."""
    for part, target in zip(whole.split([target.tensor.nbytes for target in targets]), targets, strict=True):
        host = target.empty()
        host.view(-1).view(torch.uint8).copy_(part)
        target.store()

"""What moves as it is: old names of torch.distributed's and new, shapes and meanings as there. Collective over the group."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

from mpidp.c10d.base import Base, Tensors, check, root_of, several
from mpidp.c10d.hosted import Hosted
from mpidp.c10d.works import Promise


class Moves(Base):
    """Broadcast, gather, scatter and exchange."""

    def broadcast(self, tensors: Tensors, opts: Any = None, timeout: timedelta | None = None) -> Promise:
        """In place."""
        given, root = several(tensors), root_of(opts)
        hosted = [Hosted(tensor) for tensor in given]

        def work() -> None:
            for tensor in hosted:
                if self.comm.rank == root:
                    self._calls.bcast(tensor.load(), root)
                else:
                    self._calls.bcast(tensor.empty(), root)
                    tensor.store()

        return self._begin(f"broadcast from rank {root}", work, given, given, opts, timeout)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Promise:
        """From one tensor to one."""
        return self.all_gather_single_coalesced([output], [input], opts)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Promise:
        """Several of them."""
        outs, ins = several(outputs), several(inputs)
        check(all(o.numel() == i.numel() * self.comm.size and o.dtype == i.dtype for o, i in zip(outs, ins, strict=True)),
               "all_gather", "the output must be the input's size times the number of ranks, of its dtype")
        pairs = [(Hosted(i), Hosted(o)) for i, o in zip(ins, outs, strict=True)]

        def work() -> None:
            for source, target in pairs:
                self._calls.allgather(source.load(), target.empty())
                target.store()

        return self._begin("all_gather", work, ins, outs, opts)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def allgather(self, outputs: Any, inputs: Tensors, opts: Any = None) -> Promise:
        """To a list a tensor, whose lengths may differ."""
        ins, lists = several(inputs), [outputs] if isinstance(inputs, torch.Tensor) else list(outputs)
        return self._gathered("all_gather", [list(row) for row in lists], ins, opts)

    def allgather_coalesced(self, output_lists: Any, inputs: Tensors, opts: Any = None) -> Promise:
        """output_lists: of each rank, a tensor for each input."""
        return self._gathered("all_gather", [list(row) for row in zip(*output_lists, strict=True)], several(inputs), opts)

    def _gathered(self, name: str, lists: list[list[torch.Tensor]], ins: list[torch.Tensor], opts: Any) -> Promise:
        for row, tensor in zip(lists, ins, strict=True):
            check(len(row) == self.comm.size and {o.dtype for o in row} == {tensor.dtype}, name,
                   "the output list must have a tensor a rank, of the input's dtype")
            check(row[self.comm.rank].numel() == tensor.numel(), name, "this rank's output has another size than its input")
        rows = [([Hosted(o) for o in row], Hosted(i)) for row, i in zip(lists, ins, strict=True)]

        def work() -> None:
            for targets, source in rows:
                mine, lengths = source.load(), [target.tensor.nbytes for target in targets]
                whole = torch.empty(sum(lengths), dtype=torch.uint8)
                if len(set(lengths)) == 1:
                    self._calls.allgather(mine.view(-1).view(torch.uint8), whole)
                else:
                    self._calls.allgatherv(mine, whole, lengths)
                deal(whole, targets)

        return self._begin(name, work, ins, lists, opts)

    def gather(self, outputs: Any, inputs: Tensors, opts: Any = None, *, root: int | None = None) -> Promise:
        """To a list at the root."""
        source, at = Hosted(several(inputs)[0]), root_of(opts) if root is None else root
        mine = self.comm.rank == at
        every = list(outputs if not outputs or isinstance(outputs[0], torch.Tensor) else outputs[0]) if mine else []
        check(not mine or len(every) == self.comm.size, "gather", "the root's output list must have a tensor a rank")
        check(all(o.numel() == source.tensor.numel() and o.dtype == source.tensor.dtype for o in every), "gather",
               "all tensors must be of one size and dtype")
        targets = [Hosted(o) for o in every]

        def work() -> None:
            tensor = source.load()
            whole = torch.empty(tensor.nbytes * self.comm.size, dtype=torch.uint8) if mine else None
            self._calls.gather(tensor.view(-1).view(torch.uint8), whole, at)
            if whole is not None:
                deal(whole, targets)

        return self._begin("gather", work, [source.tensor], [every], opts)

    def scatter(self, outputs: Tensors, inputs: Any, opts: Any = None, *, root: int | None = None) -> Promise:
        """From a list at the root."""
        target, at = Hosted(several(outputs)[0]), root_of(opts) if root is None else root
        mine = self.comm.rank == at
        every = list(inputs if not inputs or isinstance(inputs[0], torch.Tensor) else inputs[0]) if mine else []
        check(not mine or len(every) == self.comm.size, "scatter", "the root's input list must have a tensor a rank")
        check(all(i.numel() == target.tensor.numel() and i.dtype == target.tensor.dtype for i in every), "scatter",
               "all tensors must be of one size and dtype")
        sources = [Hosted(i) for i in every]

        def work() -> None:
            whole = torch.cat([source.load().view(-1) for source in sources]) if mine else None
            self._calls.scatter(whole, target.empty(), at)
            target.store()

        return self._begin("scatter", work, every, [target.tensor], opts)

    def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor, output_splits: Any = (), input_splits: Any = (),
                          opts: Any = None) -> Promise:
        """splits: lengths along dimension 0 to and from each rank; empty: even ones."""
        source, target = Hosted(input), Hosted(output)
        sent, taken = self._lengths(input, list(input_splits or ())), self._lengths(output, list(output_splits or ()))

        def work() -> None:
            self._calls.alltoall(source.load(), target.empty(), sent, taken)
            target.store()

        return self._begin("all_to_all", work, [input], [output], opts)

    alltoall_base = all_to_all_single

    def _lengths(self, tensor: torch.Tensor, splits: list[int]) -> list[int]:
        """In bytes, of each rank's part."""
        if not splits:
            check(tensor.dim() > 0 and tensor.shape[0] % self.comm.size == 0, "all_to_all",
                   "without splits, dimension 0 must be a multiple of the number of ranks")
            return [tensor.nbytes // self.comm.size] * self.comm.size
        check(len(splits) == self.comm.size and sum(splits) == tensor.shape[0], "all_to_all",
               "splits must be one a rank, and add up to dimension 0")
        row = tensor.nbytes // max(1, tensor.shape[0])
        return [length * row for length in splits]

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Promise:
        """From list to list."""
        sources, targets = [Hosted(i) for i in several(inputs)], [Hosted(o) for o in several(outputs)]
        check(len(sources) == len(targets) == self.comm.size, "all_to_all", "the lists must have a tensor a rank")
        lengths = [source.tensor.nbytes for source in sources], [target.tensor.nbytes for target in targets]

        def work() -> None:
            whole = torch.cat([source.load().view(-1).view(torch.uint8) for source in sources])
            got = torch.empty(sum(lengths[1]), dtype=torch.uint8)
            self._calls.alltoall(whole, got, *lengths)
            deal(got, targets)

        return self._begin("all_to_all", work, several(inputs), [t.tensor for t in targets], opts)


def deal(whole: torch.Tensor, targets: list[Hosted]) -> None:
    """Bytes to the tensors that they are, one after another."""
    for part, target in zip(whole.split([target.tensor.nbytes for target in targets]), targets, strict=True):
        host = target.empty()
        host.view(-1).view(torch.uint8).copy_(part)
        target.store()

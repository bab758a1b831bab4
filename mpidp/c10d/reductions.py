"""Collectives that reduce tensors. Methods that torch.distributed has renamed are defined under both names. All methods are
Collective over the group."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

from mpidp.c10d.base import Base, Tensors, as_list, check, op_of, root_of
from mpidp.c10d.hosted import HostBuffer
from mpidp.c10d.sums import kind_of
from mpidp.c10d.works import Promise


class Reductions(Base):
    """Collectives that reduce tensors. Shapes and semantics are those of torch.distributed. Each method returns a Work object."""

    def allreduce(self, tensors: Tensors, opts: Any = None, timeout: timedelta | None = None) -> Promise:
        """Reduce each tensor over all ranks. The results replace the tensors on every rank."""
        given, op = as_list(tensors), op_of(opts)
        if any(tensor.is_sparse for tensor in given):
            return self._sparse_allreduce(given, op, opts)
        kinds, hosted = [kind_of(op, tensor.dtype) for tensor in given], [HostBuffer(tensor) for tensor in given]

        def work() -> None:
            for kind, tensor in zip(kinds, hosted, strict=True):
                self._calls.allreduce(tensor.load(), kind)
                tensor.store()

        name = f"all_reduce of {sum(t.numel() for t in given)} elements" if given else "all_reduce"
        return self._begin(name, work, given, given, opts, timeout)

    allreduce_coalesced = allreduce

    def _sparse_allreduce(self, given: list[torch.Tensor], op: Any, opts: Any) -> Promise:
        if any(kind_of(op, tensor.dtype) != "SUM" or tensor.layout != torch.sparse_coo for tensor in given):
            raise ValueError("mpi4py: all_reduce of sparse tensors supports only SUM and the COO layout")

        def work() -> None:
            for tensor in given:
                with torch.no_grad():
                    tensor.copy_(self._calls.sparse_allreduce(tensor.detach().cpu()))

        return self._begin("all_reduce of sparse tensors", work, given, given, opts)

    def reduce(self, tensors: Tensors, opts: Any = None, *, op: Any = None) -> Promise:
        """Reduce each tensor over all ranks. The results replace the tensors of the root."""
        given, root = as_list(tensors), root_of(opts)
        kinds = [kind_of(op_of(opts) if op is None else op, tensor.dtype) for tensor in given]
        hosted = [HostBuffer(tensor) for tensor in given]

        def work() -> None:
            for kind, tensor in zip(kinds, hosted, strict=True):
                self._calls.reduce(tensor.load(), kind, root)
                if self.comm.rank == root:
                    tensor.store()

        return self._begin("reduce", work, given, given, opts)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Promise:
        """Reduce `input` over all ranks, and divide the result into equal ranges. `output` gets range r on rank r."""
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Promise:
        """Run reduce_scatter_single() for each input and output."""
        outs, ins = as_list(outputs), as_list(inputs)
        kinds = [kind_of(op_of(opts), tensor.dtype) for tensor in ins]
        check(all(o.numel() * self.comm.size == i.numel() and o.dtype == i.dtype for o, i in zip(outs, ins, strict=True)),
               "reduce_scatter", "the input must have the output's dtype, and as many elements as the outputs of all ranks "
                                 "together")
        pairs = [(HostBuffer(i), HostBuffer(o)) for i, o in zip(ins, outs, strict=True)]

        def work() -> None:
            for kind, (source, target) in zip(kinds, pairs, strict=True):
                self._calls.reduce_scatter(source.load(), target.empty(), kind)
                target.store()

        return self._begin("reduce_scatter", work, ins, outs, opts)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def reduce_scatter(self, outputs: Tensors, inputs: Any, opts: Any = None) -> Promise:
        """Reduce each tensor of a list over all ranks. The list has one tensor per rank, and rank r gets the result of tensor r.
        The tensors of a list may differ in size."""
        outs, lists = as_list(outputs), [inputs] if isinstance(outputs, torch.Tensor) else list(inputs)
        kind = kind_of(op_of(opts), outs[0].dtype)
        rows = [([HostBuffer(i) for i in every], HostBuffer(o)) for every, o in zip(lists, outs, strict=True)]

        def work() -> None:
            for every, target in rows:
                flat = [source.load().view(-1) for source in every]
                if len({len(part) for part in flat}) == 1:
                    self._calls.reduce_scatter(torch.cat(flat), target.empty(), kind)
                else:
                    for rank, part in enumerate(flat):
                        part = part.clone()
                        self._calls.reduce(part, kind, rank)
                        if rank == self.comm.rank:
                            target.empty().view(-1).copy_(part)
                target.store()

        return self._begin("reduce_scatter", work, [i for every in lists for i in every], outs, opts)

"""Reductions that read other ranks' memory match those by messages, bit for bit on all ranks. Errors are raised on all ranks."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.distributed import ReduceOp

from mpidp.c10d import calls, neighbours
from mpidp.c10d.sums import ADDED, ADDERS, HALVES
from tests.c10d.test_collectives import ids

pytestmark = pytest.mark.mpi(min_size=2)
RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
CASES = [
    (dtype, op) for dtype in ADDED for op in ADDERS
    if not (op in ("BAND", "BOR", "BXOR") and (dtype.is_floating_point or dtype.is_complex))
    and not (op in ("MIN", "MAX") and dtype.is_complex)
]


@pytest.fixture
def near(groups: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The mpi4py group, with limits so small that every reduction reads memory, a few elements at a time."""
    monkeypatch.setattr(calls, "NEAR_BYTES", 0)
    monkeypatch.setattr(calls, "SMALL_BYTES", 0)
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 256)
    monkeypatch.setattr(neighbours, "READ_BYTES", 100)
    dist.all_reduce(torch.ones(1))
    assert groups[0]._calls._neighbours is not None, "memory cannot be read here: seccomp, or another user's processes?"
    return groups[0]


def raw(length: int, dtype: torch.dtype, rank: int) -> torch.Tensor:
    return (torch.randn(length, generator=torch.Generator().manual_seed(rank)) * 3 + 4).to(dtype)


def in_order(every: list[torch.Tensor], op: str) -> torch.Tensor:
    dtype = every[0].dtype
    done = reduce(ADDERS[op], [part.float() if dtype in HALVES else part for part in every])
    if op == "AVG":
        done = done / SIZE if done.is_floating_point() or done.is_complex() else torch.div(done, SIZE, rounding_mode="trunc")
    return done.to(dtype)


@pytest.mark.parametrize(("dtype", "op"), CASES, **ids)
def test_bits_are_those_of_the_sum_in_the_order_of_ranks(near: Any, dtype: torch.dtype, op: str) -> None:
    for length in (0, 1, 63, 1000):
        every = [raw(SIZE * length, dtype, rank) for rank in range(SIZE)]
        expected = in_order(every, op)
        whole, part = every[RANK].clone(), torch.empty(length, dtype=dtype)
        near.allreduce([whole], getattr(ReduceOp, op)).wait()
        assert torch.equal(whole, expected)
        near.reduce_scatter_single(part, every[RANK]).wait()
        assert torch.equal(part, in_order(every, "SUM")[RANK * length : (RANK + 1) * length])


@pytest.mark.parametrize("where", ["own", "another's"])
def test_the_output_may_lie_in_the_input(near: Any, where: str) -> None:
    at = RANK if where == "own" else SIZE - 1 - RANK
    every = [raw(500 * SIZE, torch.float32, rank) for rank in range(SIZE)]
    whole = every[RANK].clone()
    dist.reduce_scatter_tensor(whole[500 * at : 500 * (at + 1)], whole)
    assert torch.equal(whole[500 * at : 500 * (at + 1)], in_order(every, "SUM")[500 * RANK : 500 * (RANK + 1)])


@pytest.mark.parametrize("why", ["told", "another process", "pinned"])
def test_where_one_cannot_all_send_messages(near: Any, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    group = dist.new_group()
    if RANK == SIZE - 1:
        if why == "told":
            monkeypatch.setenv(neighbours.NEAR, "messages")
        elif why == "another process":
            monkeypatch.setattr(neighbours.Neighbours, "_read", lambda *_: None)  # memory with unexpected content
        else:
            monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)
    tensor, part = torch.full((3000,), float(RANK)), torch.empty(7)
    dist.all_reduce(tensor, group=group)
    dist.reduce_scatter_tensor(part, torch.ones(7 * SIZE), group=group)
    assert (group._calls._neighbours is None) == (why != "pinned")
    assert bool((tensor == sum(range(SIZE))).all()) and bool((part == SIZE).all())
    dist.destroy_process_group(group)


def test_permission_is_given_where_it_is_missing(near: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    group, read, tries = dist.new_group(), neighbours.Neighbours._read, []

    def refused(self: Any, rank: int, address: int, into: torch.Tensor) -> None:
        tries.append(rank)
        if len(tries) > SIZE:
            return read(self, rank, address, into)
        self._failed = "refused"
        neighbours.ctypes.set_errno(neighbours.errno.EPERM)

    monkeypatch.setattr(neighbours.Neighbours, "_read", refused)
    tensor = torch.ones(100)
    dist.all_reduce(tensor, group=group)
    assert bool((tensor == SIZE).all()) and group._calls._neighbours is not None
    dist.destroy_process_group(group)


def test_who_does_not_call_the_same_is_told(near: Any) -> None:
    last = RANK == SIZE - 1
    with pytest.raises(RuntimeError, match=f"rank {SIZE - 1} has 404 bytes and rank 0 has 400"):
        dist.all_reduce(torch.ones(101 if last else 100))
    with pytest.raises(RuntimeError, match="and another dtype or reduction"):
        dist.all_reduce(torch.ones(100), ReduceOp.MAX if last else ReduceOp.SUM)
    tensor = torch.ones(100)
    dist.all_reduce(tensor)
    assert bool((tensor == SIZE).all())


def test_memory_that_cannot_be_read_is_an_error_on_all_ranks(near: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        if RANK == 0:
            patched.setattr(near._calls._neighbours, "_function", lambda *_: -1)
        with pytest.raises(RuntimeError, match="rank 0 could not read the memory of ranks on its node"):
            dist.all_reduce(torch.ones(100))
        with pytest.raises(RuntimeError, match="rank 0 could not read the memory of ranks on its node"):
            dist.reduce_scatter_tensor(torch.ones(10), torch.ones(10 * SIZE))
    tensor = torch.ones(100)
    dist.all_reduce(tensor)
    assert bool((tensor == SIZE).all())


def test_nobody_goes_on_while_others_read(near: Any) -> None:
    """A tensor overwritten right after a call does not change other ranks' results."""
    for i in range(30):
        tensor, part, whole = torch.full((40_000,), float(i)), torch.empty(10_000), torch.full((10_000 * SIZE,), float(i))
        dist.all_reduce(tensor)
        seen = tensor.clone()
        tensor.fill_(-1.0)
        dist.reduce_scatter_tensor(part, whole)
        whole.fill_(-1.0)
        assert bool((seen == i * SIZE).all()) and bool((part == i * SIZE).all())

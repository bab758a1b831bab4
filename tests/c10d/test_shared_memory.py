"""Collectives through shared memory match those by messages, bit for bit on all ranks. Errors are raised on all ranks."""

from __future__ import annotations

import os
from functools import reduce
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.distributed import ReduceOp

from mpidp.c10d import calls, shared_memory
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
    """A new mpi4py group, with limits so small that every collective uses shared memory, a few elements at a time."""
    monkeypatch.setattr(calls, "NEAR_BYTES", 0)
    monkeypatch.setattr(calls, "SMALL_BYTES", 0)
    monkeypatch.setattr(shared_memory, "PIECE_BYTES", 8192)
    group = dist.new_group()
    dist.all_reduce(torch.ones(1), group=group)
    assert group._calls._shared is not None, "memory cannot be shared here: seccomp, or another user's processes?"
    yield group
    dist.destroy_process_group(group)


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
    for length in (0, 1, 63, 1500):
        every = [raw(SIZE * length, dtype, rank) for rank in range(SIZE)]
        expected = in_order(every, op)
        whole, part = every[RANK].clone(), torch.empty(length, dtype=dtype)
        near.allreduce([whole], getattr(ReduceOp, op)).wait()
        assert torch.equal(whole, expected)
        near.reduce_scatter_single(part, every[RANK]).wait()
        assert torch.equal(part, in_order(every, "SUM")[RANK * length : (RANK + 1) * length])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.uint8, torch.complex128], **ids)
def test_broadcast_and_all_gather_copy_every_bit(near: Any, dtype: torch.dtype) -> None:
    for length in (0, 1, 63, 9000):
        every = [raw(length, dtype, rank) for rank in range(SIZE)]
        for root in range(SIZE):
            tensor = every[RANK].clone()
            dist.broadcast(tensor, root, group=near)
            assert torch.equal(tensor, every[root])
        whole = torch.empty(SIZE * length, dtype=dtype)
        near.all_gather_single(whole, every[RANK]).wait()
        assert torch.equal(whole, torch.cat(every))


@pytest.mark.parametrize("where", ["own", "another's"])
def test_the_output_may_lie_in_the_input(near: Any, where: str) -> None:
    at = RANK if where == "own" else SIZE - 1 - RANK
    every = [raw(500 * SIZE, torch.float32, rank) for rank in range(SIZE)]
    whole = every[RANK].clone()
    dist.reduce_scatter_tensor(whole[500 * at : 500 * (at + 1)], whole, group=near)
    assert torch.equal(whole[500 * at : 500 * (at + 1)], in_order(every, "SUM")[500 * RANK : 500 * (RANK + 1)])


@pytest.mark.parametrize("why", ["setting", "another node", "no file"])
def test_without_shared_memory_all_ranks_use_messages(near: Any, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """On another node the process id of rank 0 belongs to an unrelated process, or to none. Limits of the system may prevent
    rank 0 from making the file."""
    group = dist.new_group()
    if why == "no file":
        monkeypatch.setattr(os, "truncate", lambda *_: os.open("/missing", os.O_RDONLY))  # OSError, as with `ulimit -f`
    elif RANK == SIZE - 1:
        if why == "setting":
            monkeypatch.setenv(shared_memory.NEAR, "messages")
        else:
            monkeypatch.setattr(shared_memory.SharedMemory, "_map", lambda self, path, size, token: False)
    tensor, part = torch.full((3000,), float(RANK)), torch.empty(7)
    dist.all_reduce(tensor, group=group)
    dist.reduce_scatter_tensor(part, torch.ones(7 * SIZE), group=group)
    assert group._calls._shared is None
    assert bool((tensor == sum(range(SIZE))).all()) and bool((part == SIZE).all())
    dist.destroy_process_group(group)


@pytest.mark.parametrize("content", ["another token", "another size"])
def test_a_file_of_an_unrelated_process_is_not_mapped(near: Any, tmp_path: Any, content: str) -> None:
    memory = shared_memory.SharedMemory(lambda numbers: [numbers], lambda: None, 0, 1)
    file = tmp_path / "file"
    file.write_bytes(bytes(4096 if content == "another token" else 1))
    assert not memory._map(str(file), 4096, [1, 2])
    assert not any(file.read_bytes())


def test_different_calls_are_an_error_on_all_ranks(near: Any) -> None:
    last = RANK == SIZE - 1
    with pytest.raises(RuntimeError, match=f"rank {SIZE - 1} has 404 bytes and rank 0 has 400"):
        dist.all_reduce(torch.ones(101 if last else 100), group=near)
    with pytest.raises(RuntimeError, match="and their collectives, dtypes or reductions differ"):
        dist.all_reduce(torch.ones(100), ReduceOp.MAX if last else ReduceOp.SUM, group=near)
    tensor = torch.ones(100)
    dist.all_reduce(tensor, group=near)
    assert bool((tensor == SIZE).all())


def test_a_call_returns_only_when_no_other_rank_needs_the_tensor(near: Any) -> None:
    """A tensor overwritten right after a call does not change other ranks' results."""
    for i in range(30):
        tensor, part, whole = torch.full((40_000,), float(i)), torch.empty(10_000), torch.full((10_000 * SIZE,), float(i))
        dist.all_reduce(tensor, group=near)
        seen = tensor.clone()
        tensor.fill_(-1.0)
        dist.reduce_scatter_tensor(part, whole, group=near)
        whole.fill_(-1.0)
        assert bool((seen == i * SIZE).all()) and bool((part == i * SIZE).all())

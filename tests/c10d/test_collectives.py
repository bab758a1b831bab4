"""Collectives match gloo for each dtype and reduction that gloo supports; others are checked against their definition."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.distributed import ReduceOp

from mpidp.c10d import calls
from tests.c10d.conftest import Both

pytestmark = pytest.mark.mpi
RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WHOLE = [torch.int8, torch.uint8, torch.int32, torch.int64]
ALL = [*FLOATS, *WHOLE]
ids = {"ids": lambda value: str(value).rpartition(".")[2]}


def values(length: int, dtype: torch.dtype, rank: int = RANK) -> torch.Tensor:
    """Values that differ between ranks, small enough that products fit into int8."""
    made = torch.rand(length, generator=torch.Generator().manual_seed(rank)) * 2 + 0.5
    return made.to(dtype)


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("op", ["SUM", "PRODUCT", "MIN", "MAX"])
@pytest.mark.parametrize("dtype", ALL, **ids)
def test_all_reduce(both: Both, dtype: torch.dtype, op: str, async_op: bool) -> None:
    def work(group: Any) -> torch.Tensor:
        tensor = values(1003, dtype)
        under_way = dist.all_reduce(tensor, getattr(ReduceOp, op), group=group, async_op=async_op)
        if async_op:
            under_way.wait()
            assert under_way.is_completed() and under_way.is_success()
        return tensor

    both(work)


@pytest.mark.parametrize("op", ["BAND", "BOR", "BXOR"])
@pytest.mark.parametrize("dtype", WHOLE, **ids)
def test_bits(both: Both, dtype: torch.dtype, op: str) -> None:
    def work(group: Any) -> torch.Tensor:
        tensor = torch.arange(100).add(RANK * 37).to(dtype)
        dist.all_reduce(tensor, getattr(ReduceOp, op), group=group)
        return tensor

    both(work)


@pytest.mark.parametrize("op", ["SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "AVG"])
@pytest.mark.parametrize("dtype", [*ALL, torch.bool, torch.int16, torch.complex64, torch.complex128], **ids)
def test_every_reduction_is_its_definition(groups: Any, dtype: torch.dtype, op: str) -> None:
    """Unsupported reductions raise before anything is sent; the group stays usable."""
    def raw(rank: int) -> torch.Tensor:
        return values(50, dtype, rank) if dtype != torch.bool else torch.arange(50) % (rank + 2) == 0

    every = [raw(rank) for rank in range(SIZE)]
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    tensor = every[RANK].clone()
    real = dtype.is_floating_point or dtype.is_complex
    if op.startswith("B") and real or dtype.is_complex and op in ("MIN", "MAX") or op == "AVG" and dtype == torch.bool:
        with pytest.raises(TypeError, match=op):
            groups[0].allreduce([tensor], getattr(ReduceOp, op))
        dist.barrier()
        return
    add = {
        "SUM": torch.add, "AVG": torch.add, "PRODUCT": torch.mul, "MIN": torch.minimum, "MAX": torch.maximum,
        "BAND": torch.bitwise_and, "BOR": torch.bitwise_or, "BXOR": torch.bitwise_xor,
    }[op]
    expected = reduce(add, [part.to(wide) for part in every])
    if op == "AVG":
        expected = expected / SIZE if real else torch.div(expected, SIZE, rounding_mode="trunc")
    groups[0].allreduce([tensor], getattr(ReduceOp, op)).wait()
    torch.testing.assert_close(tensor, expected.to(dtype), rtol=1e-2 if wide != dtype else 1e-5, atol=1e-5)


def test_other_layouts(both: Both) -> None:
    def work(group: Any) -> list[torch.Tensor]:
        turned, part, none = torch.rand(6, 4).t(), torch.rand(9, 5)[2:7], torch.rand(0)
        for tensor in (turned, part, none):
            dist.all_reduce(tensor.contiguous() if group is not dist.group.WORLD else tensor, group=group)
        return [turned.shape and torch.empty(0), torch.empty(0)]

    both(work)
    turned = torch.full((6, 4), float(RANK)).t()
    dist.all_reduce(turned)
    assert torch.equal(turned, torch.full((4, 6), float(sum(range(SIZE)))))


def test_sparse_all_reduce(both: Both) -> None:
    def work(group: Any) -> torch.Tensor:
        at = torch.tensor([[RANK, RANK + 1, 0]])
        tensor = torch.sparse_coo_tensor(at, torch.rand(3, 2), (SIZE + 2, 2)).coalesce()
        dist.all_reduce(tensor, group=group)
        return tensor

    both(work)


@pytest.mark.parametrize("root", [0, SIZE - 1])
@pytest.mark.parametrize("dtype", [*ALL, torch.bool], **ids)
def test_broadcast_gather_scatter_reduce(both: Both, dtype: torch.dtype, root: int) -> None:
    def work(group: Any) -> list[torch.Tensor]:
        make = (torch.rand(7) * 4).to(dtype)
        sent, got = make.clone(), torch.empty_like(make)
        dist.broadcast(sent, root, group=group)
        every = [torch.empty_like(make) for _ in range(SIZE)] if root == RANK else None
        dist.gather(make, every, root, group=group)
        parts = [make if dtype == torch.bool else make + i for i in range(SIZE)]
        dist.scatter(got, parts if root == RANK else None, root, group=group)
        added = make.clone()
        if dtype != torch.bool:
            dist.reduce(added, root, group=group)
        return [sent, got, *(every or []), *([added] if root == RANK else [])]

    both(work)


@pytest.mark.parametrize("dtype", [*ALL, torch.bool], **ids)
def test_all_gather(both: Both, dtype: torch.dtype) -> None:
    def work(group: Any) -> list[torch.Tensor]:
        mine = (torch.rand(3, 2) * 4).to(dtype)
        every = [torch.empty_like(mine) for _ in range(SIZE)]
        whole, inside = mine.new_empty(3 * SIZE, 2), mine.new_zeros(SIZE * 6)
        dist.all_gather(every, mine, group=group)
        dist.all_gather_into_tensor(whole, mine, group=group)
        inside[6 * RANK : 6 * RANK + 6] = mine.view(-1)
        dist.all_gather_into_tensor(inside, inside[6 * RANK : 6 * RANK + 6], group=group)
        return [*every, whole, inside]

    both(work)


def test_all_gather_of_other_lengths(groups: Any) -> None:
    every = [torch.empty(i + 1) for i in range(SIZE)]
    dist.all_gather(every, torch.full((RANK + 1,), float(RANK)))
    assert all(torch.equal(part, torch.full((i + 1,), float(i))) for i, part in enumerate(every))


@pytest.mark.parametrize("dtype", ALL, **ids)
def test_reduce_scatter(both: Both, dtype: torch.dtype) -> None:
    def work(group: Any) -> list[torch.Tensor]:
        whole = (torch.rand(3 * SIZE, 2) * 4).to(dtype)
        one, other = whole.new_empty(3, 2), whole.new_empty(3, 2)
        dist.reduce_scatter_tensor(one, whole, group=group)
        dist.reduce_scatter(other, list(whole.split(3)), ReduceOp.MAX, group=group)
        return [one, other]

    both(work)


def test_reduce_scatter_in_place_and_of_other_lengths(groups: Any) -> None:
    whole = torch.arange(2.0 * SIZE)
    dist.reduce_scatter_tensor(whole[2 * RANK : 2 * RANK + 2], whole)
    assert torch.equal(whole[2 * RANK : 2 * RANK + 2], SIZE * torch.arange(2.0 * RANK, 2 * RANK + 2))
    out = torch.empty(RANK + 1)
    dist.reduce_scatter(out, [torch.full((i + 1,), float(i)) for i in range(SIZE)])
    assert torch.equal(out, torch.full((RANK + 1,), float(SIZE * RANK)))


@pytest.mark.parametrize("dtype", [*ALL, torch.complex64], **ids)
def test_all_to_all(both: Both, dtype: torch.dtype) -> None:
    def work(group: Any) -> list[torch.Tensor]:
        even = torch.randn(2 * SIZE, 3, dtype=dtype) if dtype.is_complex else (torch.rand(2 * SIZE, 3) * 4).to(dtype)
        out = torch.empty_like(even)
        dist.all_to_all_single(out, even, group=group)
        lengths = [(RANK + j) % 3 for j in range(SIZE)]
        odd = even[:1].repeat(sum(lengths), 1)
        got = torch.empty_like(odd)
        dist.all_to_all_single(got, odd, lengths, lengths, group=group)
        return [out, got]

    both(work)


def test_all_to_all_of_lists(groups: Any) -> None:
    ins = [torch.full((j + 1,), float(10 * RANK + j)) for j in range(SIZE)]
    outs = [torch.empty(RANK + 1) for _ in range(SIZE)]
    dist.all_to_all(outs, ins)
    assert all(torch.equal(out, torch.full((RANK + 1,), 10.0 * j + RANK)) for j, out in enumerate(outs))


def test_objects(groups: Any) -> None:
    every: list[Any] = [None] * SIZE
    dist.all_gather_object(every, {"rank": RANK, "words": "a" * RANK})
    assert [one["rank"] for one in every] == list(range(SIZE))
    shared = [{"a": 1}] if RANK == 0 else [None]
    dist.broadcast_object_list(shared, 0)
    out: list[Any] = [None]
    dist.scatter_object_list(out, list(range(SIZE)) if RANK == 0 else None, 0)
    kept: Any = [None] * SIZE if RANK == 0 else None
    dist.gather_object(RANK, kept, 0)
    assert shared == [{"a": 1}] and out == [RANK] and (RANK or kept == list(range(SIZE)))


def test_pieces(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors larger than a piece, or than the limit of one MPI call, give the same results."""
    monkeypatch.setattr(calls, "LARGEST_BYTES", 1000)
    monkeypatch.setattr("mpidp.comm.transport.PIECE_BYTES", 256)

    def work(group: Any) -> list[torch.Tensor]:
        n = 101
        added, half, sent = torch.rand(999), torch.rand(999).bfloat16(), torch.rand(999)
        dist.all_reduce(added, group=group)
        dist.all_reduce(half, group=group)
        dist.broadcast(sent, SIZE - 1, group=group)
        whole, part = torch.empty(n * SIZE), torch.empty(n)
        dist.all_gather_into_tensor(whole, torch.rand(n), group=group)
        dist.reduce_scatter_tensor(part, torch.rand(n * SIZE), group=group)
        every = [torch.empty(n) for _ in range(SIZE)] if RANK == 0 else None
        dist.gather(torch.rand(n), every, 0, group=group)
        got = torch.empty(n)
        dist.scatter(got, list(torch.rand(SIZE, n)) if RANK == 0 else None, 0, group=group)
        lengths = [n * ((RANK + j) % 3) for j in range(SIZE)]
        odd, out = torch.rand(sum(lengths)), torch.empty(sum(lengths))
        dist.all_to_all_single(out, odd, lengths, lengths, group=group)
        there = torch.empty(n * 7)
        steps = [dist.P2POp(dist.isend, torch.rand(n * 7), (RANK + 1) % SIZE, group=group),
                 dist.P2POp(dist.irecv, there, (RANK - 1) % SIZE, group=group)]
        for message in dist.batch_isend_irecv(steps):
            message.wait()
        return [added, half, sent, whole, part, *(every or []), got, out, there]

    both(work)
    uneven = [torch.empty(100 * (i + 1)) for i in range(SIZE)]
    dist.all_gather(uneven, torch.full((100 * (RANK + 1),), float(RANK)))
    assert all(bool((part == i).all()) for i, part in enumerate(uneven))


@pytest.mark.parametrize("blocking", [False, True])
def test_the_two_ways_to_wait_give_the_same(groups: Any, blocking: bool) -> None:
    ours = groups[0]
    before, ours._calls.blocking = ours._calls.blocking, blocking
    try:
        tensor = torch.full((1 << 18,), float(RANK + 1))
        dist.all_reduce(tensor)
        part = torch.empty(1 << 16)
        dist.reduce_scatter_tensor(part, torch.ones(SIZE << 16))
    finally:
        ours._calls.blocking = before
    assert bool((tensor == SIZE * (SIZE + 1) / 2).all()) and bool((part == SIZE).all())


def test_wrong_sizes_are_refused_and_the_group_goes_on(groups: Any) -> None:
    for wrong in (
        lambda: dist.all_gather_into_tensor(torch.empty(SIZE + 1), torch.empty(1)),
        lambda: dist.reduce_scatter_tensor(torch.empty(2), torch.empty(2 * SIZE + 1)),
        lambda: dist.all_to_all_single(torch.empty(SIZE + 1), torch.empty(SIZE), [1] * SIZE, [1] * SIZE),
        lambda: dist.all_reduce(torch.ones(3).to(torch.float8_e4m3fn)),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            wrong()
    dist.barrier()

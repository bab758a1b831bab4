"""Point-to-point messages, works and futures, coalesced and functional collectives, subgroups."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from mpi4py import MPI

from tests.c10d.conftest import Both

pytestmark = pytest.mark.mpi
RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size


@pytest.mark.parametrize("length", [0, 5, 300_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_a_ring_of_messages(both: Both, dtype: torch.dtype, length: int) -> None:
    def work(group: Any) -> torch.Tensor:
        mine = (torch.rand(length) * 2).to(dtype)
        got = torch.empty_like(mine)
        steps = [dist.P2POp(dist.isend, mine, (RANK + 1) % SIZE, group=group),
                 dist.P2POp(dist.irecv, got, (RANK - 1) % SIZE, group=group)]
        for message in dist.batch_isend_irecv(steps):
            message.wait()
        return got

    both(work)


def test_send_and_receive_with_tags_in_another_order(groups: Any) -> None:
    if SIZE < 2 or RANK > 1:
        return
    if RANK == 0:
        kept = [dist.isend(torch.full((4,), float(tag)), 1, tag=tag) for tag in range(5)]
        for message in kept:
            message.wait()
        return
    for tag in (3, 1, 4, 0, 2):
        got = torch.empty(4)
        assert dist.recv(got, 0, tag=tag) == 0
        assert bool((got == tag).all())


def test_from_whoever_comes(groups: Any) -> None:
    if RANK:
        dist.send(torch.full((3,), float(RANK)), 0)
        return
    seen = set()
    for _ in range(SIZE - 1):
        got = torch.empty(3)
        source = dist.recv(got)
        assert bool((got == source).all())
        seen.add(source)
    assert seen == set(range(1, SIZE))


def test_a_message_whose_work_is_dropped_arrives(groups: Any) -> None:
    for i in range(20):
        dist.isend(torch.full((50_000,), float(i)), (RANK + 1) % SIZE)
    for i in range(20):
        got = torch.empty(50_000)
        dist.recv(got, (RANK - 1) % SIZE)
        assert bool((got == i).all())


def test_a_receive_that_nobody_meets_does_not_outlive_its_group(groups: Any) -> None:
    group = dist.new_group()
    left = dist.irecv(torch.empty(3), (RANK + 1) % SIZE, group=group)
    dist.destroy_process_group(group)
    assert group.comm == MPI.COMM_NULL
    with pytest.raises(RuntimeError, match="destroyed"):
        left.wait()


def test_futures(groups: Any) -> None:
    """A future holds the call's tensors. Callbacks may start other calls; an error in a callback is the future's error."""
    tensor = torch.ones(4)
    future = dist.all_reduce(tensor, async_op=True).get_future()
    assert future.then(lambda done: done.value()[0] / SIZE).wait().tolist() == [1.0] * 4
    got = torch.empty(4)
    send = dist.isend(torch.full((4,), float(RANK)), (RANK + 1) % SIZE)
    future = dist.irecv(got, (RANK - 1) % SIZE).get_future()
    assert bool((future.wait()[0] == (RANK - 1) % SIZE).all())
    send.wait()

    def fails(_: Any) -> None:
        raise ValueError("on purpose")

    with pytest.raises(Exception, match="on purpose"):
        dist.all_reduce(tensor, async_op=True).get_future().then(fails).wait()


def test_many_at_once_in_order(groups: Any) -> None:
    tensors = [torch.full((1000 * (i % 3 + 1),), float(i)) for i in range(60)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in reversed(works):
        work.wait()
    assert all(bool((tensor == i * SIZE).all()) for i, tensor in enumerate(tensors))


def test_two_groups_in_another_order_on_each_rank(groups: Any) -> None:
    one, other = dist.new_group(), dist.new_group()
    x, y = torch.ones(100_000), torch.ones(100_000)
    pairs = [(one, x), (other, y)]
    works = [dist.all_reduce(tensor, group=group, async_op=True) for group, tensor in (pairs if RANK % 2 else pairs[::-1])]
    for work in works:
        work.wait()
    assert bool((x == SIZE).all()) and bool((y == SIZE).all())
    dist.destroy_process_group(one)
    dist.destroy_process_group(other)


def test_coalesced(both: Both) -> None:
    def work(group: Any) -> list[torch.Tensor]:
        ins = [torch.rand(3), torch.rand(4)]
        outs, parts = [torch.empty(3 * SIZE), torch.empty(4 * SIZE)], [torch.empty(2), torch.empty(1)]
        whole = [torch.rand(2 * SIZE), torch.rand(SIZE)]
        with dist._coalescing_manager(group=group):
            for tensor in ins:
                dist.all_reduce(tensor, group=group)
        with dist._coalescing_manager(group=group, async_ops=True) as manager:
            for out, tensor in zip(outs, ins, strict=True):
                dist.all_gather_into_tensor(out, tensor, group=group)
        manager.wait()
        with dist._coalescing_manager(group=group):
            for part, tensor in zip(parts, whole, strict=True):
                dist.reduce_scatter_tensor(part, tensor, group=group)
        return [*ins, *outs, *parts]

    both(work)


FUNCTIONAL = {
    "all_reduce": lambda x, g: functional.all_reduce(x, "sum", g),
    "all_gather_tensor": lambda x, g: functional.all_gather_tensor(x, 0, g),
    "all_gather_columns": lambda x, g: functional.all_gather_tensor(x, 1, g),
    "reduce_scatter_tensor": lambda x, g: functional.reduce_scatter_tensor(x, "sum", 0, g),
    "all_to_all_single": lambda x, g: functional.all_to_all_single(x, None, None, g),
    "broadcast": lambda x, g: functional.broadcast(x, 0, g),
    "all_reduce_coalesced": lambda x, g: functional.all_reduce_coalesced([x, x * 2], "sum", g),
    "all_gather_into_tensor_coalesced": lambda x, g: functional.all_gather_into_tensor_coalesced([x, x * 2], g),
    "reduce_scatter_tensor_coalesced": lambda x, g: functional.reduce_scatter_tensor_coalesced([x, x], "sum", [0, 0], g),
    "all_gather_into_tensor_out": lambda x, g: torch.ops._c10d_functional.wait_tensor(
        torch.ops._c10d_functional.all_gather_into_tensor_out(x, SIZE, g.group_name, out=x.new_empty(SIZE * len(x), 3))
    ),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional(both: Both, name: str) -> None:
    def work(group: Any) -> list[torch.Tensor]:
        found = FUNCTIONAL[name](torch.rand(2 * SIZE, 3), group)
        return [one + 0 for one in found] if isinstance(found, list) else [found + 0]

    both(work)


def test_groups_of_some(groups: Any) -> None:
    parts = [dist.new_group([rank for rank in range(SIZE) if rank % 2 == odd]) for odd in range(min(2, SIZE))]
    mine = parts[RANK % 2]
    tensor = torch.full((3,), float(RANK))
    dist.all_reduce(tensor, group=mine)
    assert bool((tensor == sum(range(RANK % 2, SIZE, 2))).all())
    assert dist.get_world_size(mine) == len(range(RANK % 2, SIZE, 2))
    dist.broadcast(tensor, RANK % 2, group=mine)
    dist.destroy_process_group(mine)


def test_made_by_its_members_alone(groups: Any) -> None:
    if RANK == SIZE - 1:
        alone = dist.new_group([RANK], use_local_synchronization=True)
        tensor = torch.ones(1)
        dist.all_reduce(tensor, group=alone)
        assert tensor.item() == 1
        dist.destroy_process_group(alone)


def test_300_groups_are_made_used_and_freed(groups: Any) -> None:
    for _ in range(300):
        group = dist.new_group([0, SIZE - 1])
        if RANK in (0, SIZE - 1):
            comm = group.comm
            tensor = torch.ones(3)
            dist.all_reduce(tensor, group=group)
            assert tensor[0] == min(SIZE, 2)
            dist.destroy_process_group(group)
            assert group.comm == MPI.COMM_NULL and comm == MPI.COMM_NULL


def test_a_monitored_barrier_passes(groups: Any) -> None:
    for _ in range(3):
        groups[0].monitored_barrier(timedelta(seconds=30))
        groups[0].monitored_barrier(timedelta(seconds=30), wait_all_ranks=True)


def test_a_second_job_in_the_same_process() -> None:
    """Groups can be destroyed and created again."""
    dist.destroy_process_group()
    dist.init_process_group("mpi4py", init_method="mpi://", timeout=timedelta(seconds=60))
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    assert tensor[0] == SIZE

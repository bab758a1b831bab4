"""CUDA tensors with the mpi4py process group: collectives, DDP and FSDP2 give the same results as on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mpi4py import MPI
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mpidp.c10d  # noqa: F401

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
DIM = 24


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("mpi4py", init_method="mpi://", timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


def values(length: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand(length, generator=torch.Generator().manual_seed(RANK)) * 2 + 0.5).to(dtype)


def gathered(x: torch.Tensor) -> list[torch.Tensor]:
    found = [torch.empty_like(x) for _ in range(SIZE)]
    dist.all_gather(found, x)
    return found


def scattered(x: torch.Tensor) -> torch.Tensor:
    found = torch.empty(len(x) // SIZE, dtype=x.dtype, device=x.device)
    dist.reduce_scatter_tensor(found, x)
    return found


def summed(x: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(x)
    return x


def told(x: torch.Tensor) -> torch.Tensor:
    dist.broadcast(x, SIZE - 1)
    return x


def exchanged(x: torch.Tensor) -> torch.Tensor:
    found = torch.empty_like(x)
    dist.all_to_all_single(found, x)
    return found


def passed_on(x: torch.Tensor) -> torch.Tensor:
    found = torch.empty_like(x)
    works = [dist.P2POp(dist.isend, x, (RANK + 1) % SIZE), dist.P2POp(dist.irecv, found, (RANK - 1) % SIZE)]
    for work in dist.batch_isend_irecv(works):
        work.wait()
    return found


CALLS: list[Callable[[torch.Tensor], Any]] = [summed, gathered, scattered, told, exchanged, passed_on]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("length", [12, 12 * 100_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_a_call_gives_what_it_gives_on_the_cpu(call: Callable[[torch.Tensor], Any], length: int, dtype: torch.dtype) -> None:
    """The values are still being computed when the call begins, and are read as soon as it is done."""
    if call is passed_on and SIZE == 1:
        pytest.skip("nobody to send to")
    expected = call(values(length, dtype))
    x = values(length, dtype).cuda()
    busy = torch.ones(2048, 2048, device="cuda")
    for _ in range(20):
        busy = busy @ busy * 0
    found = call(x + busy[0, 0].to(dtype))
    for one, other in zip(found if isinstance(found, list) else [found],
                          expected if isinstance(expected, list) else [expected], strict=True):
        assert one.is_cuda
        torch.testing.assert_close(one.cpu(), other)  # large sums on the CPU use another order


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)) for _ in range(3)))


def losses(model: nn.Module, device: str) -> list[float]:
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(5):
        x = torch.randn(8, DIM, generator=torch.Generator().manual_seed(100 * step + RANK)).to(device)
        loss = F.mse_loss(model(x), x.flip(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_training_gives_what_it_gives_on_the_cpu(how: str) -> None:
    def wrapped(device: str) -> nn.Module:
        model = net().to(device)
        if how == "ddp":
            return DistributedDataParallel(model, bucket_cap_mb=1)
        mesh = init_device_mesh(device, (SIZE,))
        for part in model:
            fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    expected = losses(wrapped("cpu"), "cpu")
    assert losses(wrapped("cuda"), "cuda") == pytest.approx(expected, rel=1e-5)

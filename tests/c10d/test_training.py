"""torch features on top of a process group give the same losses and parameters as over gloo: DDP and its hooks, FSDP2, tensor
parallelism, pipelining, sharded optimizers, checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mpi4py import MPI
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

pytestmark = [pytest.mark.mpi, pytest.mark.filterwarnings("ignore")]
RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
DIM = 24  # a multiple of 2, 3 and 4
CPU = torch.device("cpu")
Found = list[torch.Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(DIM, DIM), nn.Linear(DIM, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(12, DIM, generator=made), torch.randint(0, 8, (12,), generator=made)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, rank: int = RANK) -> Found:
    for step in range(steps):
        x, y = batch(step, rank)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.detach(), *parameters(model)]


def parameters(model: nn.Module) -> Found:
    return [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def mesh_of(group: Any) -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu", mesh=torch.arange(SIZE))


def ddp(group: Any, hook: str = "", join: bool = False, **settings: Any) -> Found:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    model = DistributedDataParallel(Net(), process_group=group, bucket_cap_mb=0.01, **settings)
    if hook == "powersgd":
        state = powerSGD_hook.PowerSGDState(group, 2, start_powerSGD_iter=2, min_compression_rate=1)
        model = DistributedDataParallel(Net(), process_group=group, bucket_cap_mb=25)  # one bucket: gloo would confuse two
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif hook:
        model.register_comm_hook(group, getattr(default_hooks, hook))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    if join:
        with model.join():
            return trained(model, optimizer, 3 + RANK)[1:]
    with model.no_sync():
        F.cross_entropy(model(batch(99, RANK)[0]), batch(99, RANK)[1]).backward()
    return trained(model, optimizer)


def zero(group: Any) -> Found:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(Net(), process_group=group)
    return trained(model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, process_group=group, lr=1e-2))


def fsdp2(group: Any, mixed: bool = False, reshard: bool = True) -> Found:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, mesh = Net(), mesh_of(group)
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)} if mixed else {}
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard, **policy)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(4):
        x, y = batch(step, RANK)
        loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [loss.detach(), *parameters(model)]


def tensor_parallel(group: Any, sequence: bool = False) -> Found:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    model, mesh = Net(), mesh_of(group)
    for block in model.blocks:
        parallelize_module(block, mesh, {
            "norm": SequenceParallel(sequence_dim=0), "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Shard(0)),
        } if sequence else {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if sequence:
        parallelize_module(model, mesh, {
            "first": ColwiseParallel(output_layouts=Shard(0)),
            "last": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
        })
    return trained(model, torch.optim.AdamW(model.parameters(), 1e-2, foreach=False), rank=0)


def dtensors(group: Any) -> Found:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh, made = mesh_of(group), torch.Generator().manual_seed(3)
    a = distribute_tensor(torch.randn(13, 9, generator=made), mesh, [Shard(0)])
    b = distribute_tensor(torch.randn(9, 7, generator=made), mesh, [Shard(0)])
    product = (a @ b).redistribute(mesh, [Shard(1)]).redistribute(mesh, [Replicate()])
    part = DTensor.from_local(torch.ones(8, 2) * (RANK + 1), mesh, [Partial()]).redistribute(mesh, [Shard(0)])
    return [product.to_local(), a.redistribute(mesh, [Shard(1)]).full_tensor(), part.full_tensor()]


def pipelined(group: Any, kind: str) -> Found:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

    torch.manual_seed(0)
    parts = [nn.Linear(DIM, DIM), *(Block() for _ in range(2 * SIZE - 2)), nn.Linear(DIM, 8)]
    if kind == "interleaved":
        mine: list[nn.Module] = [parts[RANK], parts[SIZE + RANK]]
        stages = [PipelineStage(part, i * SIZE + RANK, 2 * SIZE, CPU, group=group) for i, part in enumerate(mine)]
        schedule: Any = ScheduleInterleaved1F1B(stages, n_microbatches=2 * SIZE, loss_fn=F.cross_entropy)
    else:
        mine = [nn.Sequential(*parts[2 * RANK : 2 * RANK + 2])]
        stage = PipelineStage(mine[0], RANK, SIZE, CPU, group=group)
        schedule = {"1F1B": Schedule1F1B, "GPipe": ScheduleGPipe}[kind](stage, n_microbatches=4, loss_fn=F.cross_entropy)
    optimizer = torch.optim.SGD([p for part in mine for p in part.parameters()], 0.05)
    losses: list[torch.Tensor] = []
    for step in range(3):
        x, y = batch(step, 0)
        x, y = (x, y) if kind != "interleaved" else (x.repeat(2, 1), y.repeat(2))
        if RANK == 0:
            schedule.step(x)
        elif RANK == SIZE - 1:
            schedule.step(target=y, losses=losses)
        else:
            schedule.step()
        optimizer.step()
        optimizer.zero_grad()
    return [*(loss.detach() for loss in losses), *(p.detach() for part in mine for p in part.parameters())]


KINDS: dict[str, Callable[[Any], Found]] = {
    "ddp": ddp,
    "ddp_static": lambda g: ddp(g, static_graph=False, gradient_as_bucket_view=True),
    "ddp_unused": lambda g: ddp(g, find_unused_parameters=True),
    "ddp_join": lambda g: ddp(g, join=True),
    "ddp_fp16": lambda g: ddp(g, "fp16_compress_hook"),
    "ddp_powersgd": lambda g: ddp(g, "powersgd"),
    "zero": zero,
    "fsdp2": fsdp2,
    "fsdp2_mixed": lambda g: fsdp2(g, mixed=True),
    "fsdp2_kept": lambda g: fsdp2(g, reshard=False),
    "tensor": tensor_parallel,
    "tensor_sequence": lambda g: tensor_parallel(g, sequence=True),
    "dtensors": dtensors,
    "pipeline_1f1b": lambda g: pipelined(g, "1F1B"),
    "pipeline_gpipe": lambda g: pipelined(g, "GPipe"),
    "pipeline_interleaved": lambda g: pipelined(g, "interleaved"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_over_gloo(groups: Any, kind: str) -> None:
    if kind.startswith("pipeline") and SIZE < 2:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (KINDS[kind](group) for group in groups)
    loose = 1e-2 if kind in ("ddp_fp16", "fsdp2_mixed") else 2e-5
    assert len(ours) == len(theirs) and (ours or kind.startswith("pipeline"))
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=loose, atol=loose)


def test_distributed_checkpoint(groups: Any, shared_tmp: Path) -> None:
    """FSDP2 training continues unchanged after saving and loading its state."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Net()
        for part in [*model.blocks, model]:
            fully_shard(part, mesh=mesh_of(groups[0]))
        return model, torch.optim.AdamW(model.parameters(), 1e-2)

    model, optimizer = make()
    trained(model, optimizer)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"weights": weights, "state": state}, checkpoint_id=shared_tmp / "saved")
    expected = trained(model, optimizer)
    again, its = make()
    weights, state = get_state_dict(again, its)
    held = {"weights": weights, "state": state}
    dcp.load(held, checkpoint_id=shared_tmp / "saved")
    set_state_dict(again, its, model_state_dict=held["weights"], optim_state_dict=held["state"])
    for mine, its_own in zip(trained(again, its), expected, strict=True):
        torch.testing.assert_close(mine, its_own)


def test_a_callback_that_fails_is_an_error_of_backward(groups: Any) -> None:
    """The error is raised on every rank and does not end the process."""
    model = DistributedDataParallel(Net())

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # DDP does not read annotations that are words
        def fail(_: Any) -> torch.Tensor:
            raise ValueError("on purpose")

        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(fail)

    model.register_comm_hook(None, hook)
    with pytest.raises(Exception, match="on purpose"):
        trained(model, torch.optim.SGD(model.parameters(), 0.1), 1)

"""Synchronous data parallelism with sharded gradients and optimizer state (mesh.shard=2), or parameters too (3): torch's FSDP2
(Zhao 2023; ZeRO-2 and 3, Rajbhandari 2020) over mpidp.c10d.

Every rank has some rows of each parameter. A block's parameters are gathered before it computes; its gradient is summed over the
ranks, micro-batch by micro-batch, and each keeps its rows. At level 2 the parameters stay until the step's last backward, at
level 3 until the block is done.

So forwards and backwards are collective: a rank with fewer micro-batches, or empty ones, runs others that count for nothing. The
sum's order is MPI's: the weights are those of level 0 to rounding, not to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.local_parameters import bytes_by_use, load_boxes, reshard_all, shard_of
from mpidp.comm.group import Group
from mpidp.errors import UsageError
from mpidp.parallel.model_part import ModelPartition
from mpidp.reducers.base import LaneObserver, Reducer
from mpidp.strategies.optimizer import Optimizer, ShardedOptimizer
from mpidp.strategies.protocol import StepStats, StrategyOptions


def shard(model: Any, comm: MPI.Intracomm, level: int, device: torch.device) -> None:
    """Each rank keeps its rows of every parameter. UsageError when torch.distributed is in use. Collective over comm."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    import mpidp.c10d

    if dist.is_initialized():
        raise UsageError.on_every_rank(f"mesh.shard={level} uses torch.distributed, which something else in this process uses")
    mpidp.c10d.use(comm)
    dist.init_process_group("mpi4py", init_method="mpi://")
    world: Any = dist.group.WORLD
    mesh = DeviceMesh.from_group(world, device.type)
    for module in [*model.blocks.children(), model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=level == 3)
        module.set_gradient_divide_factor(1.0)  # a sum: losses were divided by all ranks' tokens
        module.set_force_sum_reduction_for_comms(True)


def unshard_for_good() -> None:
    """The end of shard(): sharded models cannot be used any more. Collective over its comm."""
    import torch.distributed as dist

    import mpidp.c10d

    dist.destroy_process_group()
    mpidp.c10d.use(MPI.COMM_WORLD)


class Sharded:
    """Every step waits for all lanes."""

    survives_failures = False  # shards die with their holder
    synchronizes_always = True
    buffer: Any = None  # of flat gradients: there is none

    def __init__(
        self, comm: MPI.Intracomm, group: Group, named_parameters: list[tuple[str, torch.nn.Parameter]], reducer: Reducer,
        make_optimizer: partial[Optimizer], clip: float, nominal_tokens: int, bucket_bytes: int, one_copy: bool,
        spare_slots: int = 0, most_slots: int = 0, options: StrategyOptions | None = None, parts: ModelPartition | None = None, *,
        model: torch.nn.Module, level: int,
    ) -> None:
        """As Synchronous; of the reducer only the lanes are looked at. Collective over comm."""
        self.compute_comm, self.group, self.reducer, self.one_copy, self.level = comm, group, reducer, False, level
        self.model: Any = model
        self.clip, self.nominal_tokens = clip, nominal_tokens
        self._parts = parts
        lanes, shares = reducer.lanes, reducer.shares
        self._most = max(sum(len(lanes.micro_batches(lane)) for lane in mine) for mine in shares.ranges)  # of any rank
        self._made = self._open = 0  # forwards of this step; of them those whose backward is not counted yet
        shard(model, comm, level, reducer.transport.device)
        self.named = list(model.named_parameters())
        self._sent_bytes = sum(shard_of(p).tensor.nbytes for _, p in self.named) * (comm.size - 1)  # when all are gathered once
        pieces = [(name, shard_of(p).tensor, p.dim() >= 2) for name, p in self.named]
        self.optimizer = ShardedOptimizer(make_optimizer.args[0], pieces, **make_optimizer.keywords)
        model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._open += 1

    @contextmanager
    def micro_batch(self, v: int, last: bool, chunk: int = 0) -> Iterator[None]:
        """Backward of micro-batch v runs inside; after the last one those that this rank lacks. Collective over compute_comm,
        but for v."""
        self._keep(last and self._made + 1 >= self._most)
        yield
        if not self._open:  # it was empty
            self._idle()
        self._open, self._made = 0, self._made + 1
        while last and self._made < self._most:
            self._keep(self._made + 1 == self._most)
            self._idle()
            self._open, self._made = 0, self._made + 1

    def _keep(self, last: bool) -> None:
        """Level 2: parameters stay as they are until the step's last backward."""
        if self.level == 2:
            self.model.set_reshard_after_backward(last)

    def _idle(self) -> None:
        """A forward and a backward that add zero to every gradient."""
        tokens = torch.zeros(1, 1, dtype=torch.int64, device=self.named[0][1].device)
        (self.model(tokens).float().sum() * 0.0).backward()

    @torch.no_grad()
    def fill(self, forwards: int) -> None:
        """So many that nobody looks at. Collective over compute_comm, whose other ranks have as many more to make."""
        for _ in range(forwards):
            self.model(torch.zeros(1, 1, dtype=torch.int64, device=self.named[0][1].device))

    def synchronizes_at(self, step: int) -> bool:
        """Independent."""
        return True

    def start(self) -> None:
        """Replicas are equal by their seed. Independent."""

    def observe_lanes(self, observers: Sequence[LaneObserver]) -> None:
        """ValueError: there are no gradients of lanes. Independent."""
        if observers:
            raise ValueError("sharded gradients are summed as they come: lanes cannot be looked at one by one")

    def discard(self) -> None:
        """Independent."""
        self._made = 0
        for _, p in self.named:
            p.grad = None

    def step(self, lr: float, tokens: int, limit: float = math.inf) -> StepStats:
        """As Synchronous.step, on shards: the norm is a sum over ranks in their order, the same bits on each. Collective over
        compute_comm."""
        self.reducer.observers.enter("reduce")
        reshard_all(self.model)
        gradients = [shard_of(grad).tensor for _, p in self.named if (grad := p.grad) is not None]  # of all: idle ones too
        scale = self.nominal_tokens / max(1, tokens)
        norm = self._norm(gradients) * scale if tokens else 0.0
        if self.clip and norm > self.clip:
            scale *= self.clip / norm
        skipped = not (tokens and math.isfinite(norm) and norm <= limit)
        if not skipped:
            self.reducer.observers.enter("apply")
            for gradient in gradients:
                gradient.mul_(scale)
            self.optimizer.step(gradients, lr)
        self.discard()
        gathers = 2 * self._most if self.level == 3 else 1  # before each forward and backward, or once
        self.reducer.transport.sent_bytes += self._sent_bytes * (self._most + gathers)  # and a sum after each backward
        self.reducer.observers.enter("publish")
        return StepStats(grad_norm=norm, skipped=skipped)

    def _norm(self, gradients: list[Tensor]) -> float:
        here = self._parts.counts if self._parts else lambda name: True
        known = [one for (name, _), one in zip(self.named, gradients, strict=True) if one.numel() and here(name)]
        mine = sum(float(torch.linalg.vector_norm(one, dtype=torch.float64)) ** 2 for one in known)
        rows = np.zeros(self.compute_comm.size)
        rows[self.compute_comm.rank] = mine
        self.group.wait(self.compute_comm.Iallgather(MPI.IN_PLACE, rows))
        squares = sum(rows.tolist())
        return self._parts.grid.norm([torch.tensor([squares], dtype=torch.float64)]) if self._parts else math.sqrt(squares)

    def finish(self) -> None:
        """Nothing is in flight between steps. Independent."""

    def flats(self) -> dict[str, Tensor]:
        """Nobody else holds the same. Independent."""
        return {}

    def held(self) -> dict[str, int]:
        """Bytes by what they are for, now. Independent."""
        local = [shard_of(p).tensor for _, p in self.named]
        gradients = [shard_of(p.grad).tensor for _, p in self.named if p.grad is not None]
        moments = [one for row in self.optimizer.state for one in row.values()]
        return bytes_by_use(parameters=local, gradients=gradients, optimizer=moments)

    def state_dict(self) -> dict[str, Entry]:
        """This rank's rows of the optimizer's state. Independent."""
        found: dict[str, Entry] = {}
        for (name, p), state in zip(self.named, self.optimizer.state, strict=True):
            part = shard_of(p)
            found |= {f"{name}/{key}": Entry(value, "sharded", part.at, tuple(p.shape)) for key, value in state.items()}
            if "exp_avg" in state:
                found[f"{name}/step"] = Entry(torch.tensor(float(self.optimizer.updates)))
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Of boxes, those that state_dict has. Independent."""
        own = {name: value for name, value in state.items() if not name.startswith("reducer/")}
        self.reducer.load_state_dict({name.removeprefix("reducer/"): state[name] for name in state if name not in own})
        load_boxes(own, self.state_dict(), self.optimizer)

    def release(self) -> None:
        """Independent."""

    def close(self) -> None:
        """Parameters and state are gone. Collective over compute_comm."""
        unshard_for_good()
        self.group.close()

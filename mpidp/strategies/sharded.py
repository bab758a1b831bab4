"""Synchronous data parallelism with sharded gradients and optimizer state (mesh.shard=2), or also sharded parameters
(mesh.shard=3). It uses torch's FSDP2 (Zhao 2023; ZeRO-2 and ZeRO-3, Rajbhandari 2020), with mpidp.c10d for communication.

Every rank stores some rows of each parameter. The parameters of a Transformer block are gathered before the block is computed.
For each micro-batch, the block's gradient is summed over the ranks, and each rank keeps its rows of the sum. At level 2, the
gathered parameters are kept until the last backward pass of the step. At level 3, they are freed when the block has been
computed.

Forward and backward passes are therefore collective. A rank with fewer micro-batches than others, or with empty ones, runs dummy
passes. MPI chooses the order of addition, so weights equal the weights of level 0 only up to rounding.
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
from mpidp.comm.slices import sum_in_order
from mpidp.errors import UsageError
from mpidp.parallel.model_part import ModelPartition
from mpidp.reducers.base import LaneObserver, Reducer
from mpidp.strategies.optimizer import Optimizer, ShardedOptimizer
from mpidp.strategies.protocol import StepStats, StrategyOptions


def shard(model: Any, comm: MPI.Intracomm, level: int, device: torch.device) -> None:
    """Shard the model, so that each rank keeps its rows of every parameter. Raises UsageError if torch.distributed is already
    initialized. Collective over comm."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    import mpidp.c10d

    if dist.is_initialized():
        raise UsageError.on_every_rank(f"mesh.shard={level} needs torch.distributed, which this process has initialized already")
    mpidp.c10d.use(comm)
    dist.init_process_group("mpi4py", init_method="mpi://")
    world: Any = dist.group.WORLD
    mesh = DeviceMesh.from_group(world, device.type)
    for module in [*model.blocks.children(), model]:
        stays = module is model and model.defers_head  # the loss uses the matrix of the output layer after forward
        fully_shard(module, mesh=mesh, reshard_after_forward=level == 3 and not stays)
        module.set_gradient_divide_factor(1.0)  # sum gradients, because losses are divided by the tokens of all ranks
        module.set_force_sum_reduction_for_comms(True)


def unshard_for_good() -> None:
    """End torch.distributed after shard(). Sharded models cannot be used afterwards. Collective over the comm of shard()."""
    import torch.distributed as dist

    import mpidp.c10d

    dist.destroy_process_group()
    mpidp.c10d.use(MPI.COMM_WORLD)


class Sharded:
    """Synchronous data parallelism on a sharded model."""

    survives_failures = False  # a shard is lost with the rank that holds it
    synchronizes_always = True
    buffer: Any = None  # this strategy has no flat gradient buffer

    def __init__(
        self, comm: MPI.Intracomm, group: Group, named_parameters: list[tuple[str, torch.nn.Parameter]], reducer: Reducer,
        make_optimizer: partial[Optimizer], clip: float, nominal_tokens: int, bucket_bytes: int, one_copy: bool,
        spare_slots: int = 0, most_slots: int = 0, options: StrategyOptions | None = None, parts: ModelPartition | None = None, *,
        model: torch.nn.Module, level: int,
    ) -> None:
        """Takes the arguments of Synchronous. Only the attributes lanes, shares and transport of the reducer are used. model: the
        model, which this constructor shards. level: 2 or 3. Collective over comm."""
        self.compute_comm, self.group, self.reducer, self.one_copy, self.level = comm, group, reducer, False, level
        self.model: Any = model
        self.clip, self.nominal_tokens = clip, nominal_tokens
        self._parts = parts
        lanes, shares = reducer.lanes, reducer.shares
        # The number of forward passes of every rank in a step, which is the largest number of micro-batches of any rank.
        self._most = max(sum(len(lanes.micro_batches(lane)) for lane in mine) for mine in shares.ranges)
        self._made = self._open = 0  # forward passes of this step before, and in, the current micro-batch
        shard(model, comm, level, reducer.transport.device)
        self.named = list(model.named_parameters())
        self._sent_bytes = sum(shard_of(p).tensor.nbytes for _, p in self.named) * (comm.size - 1)  # for one gather of all shards
        pieces = [(name, shard_of(p), p.dim() >= 2) for name, p in self.named]
        self.optimizer = ShardedOptimizer(make_optimizer.args[0], pieces, **make_optimizer.keywords)
        model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._open += 1

    @contextmanager
    def micro_batch(self, v: int, last: bool, chunk: int = 0) -> Iterator[None]:
        """Return a context in which micro-batch v must be computed. At the end of the rank's last micro-batch, the context runs
        dummy passes until this rank has run as many as the other ranks. Ranks may pass different v. Collective over
        compute_comm."""
        self._keep(last and self._made + 1 >= self._most)
        yield
        if not self._open:  # the micro-batch was empty
            self._idle()
        self._open, self._made = 0, self._made + 1
        while last and self._made < self._most:
            self._keep(self._made + 1 == self._most)
            self._idle()
            self._open, self._made = 0, self._made + 1

    def _keep(self, last: bool) -> None:
        """At level 2, keep the gathered parameters until the last backward pass of the step."""
        if self.level == 2:
            self.model.set_reshard_after_backward(last)

    def _idle(self) -> None:
        """Run a dummy forward and backward pass that adds zero to every gradient."""
        tokens = torch.zeros(1, 1, dtype=torch.int64, device=self.named[0][1].device)
        (self.model(tokens).float().sum() * 0.0).backward()

    @torch.no_grad()
    def fill(self, forwards: int) -> None:
        """Run `forwards` dummy forward passes, because other ranks run this number of additional passes. Collective over
        compute_comm."""
        for _ in range(forwards):
            self.model(torch.zeros(1, 1, dtype=torch.int64, device=self.named[0][1].device))

    def synchronizes_at(self, step: int) -> bool:
        """Return True: all ranks synchronize at every step. Independent."""
        return True

    def start(self) -> None:
        """Do nothing, because all replicas have drawn equal weights from the same seed. Independent."""

    def observe_lanes(self, observers: Sequence[LaneObserver]) -> None:
        """Raise ValueError if there are observers, because no rank has the gradient of a single lane. Independent."""
        if observers:
            raise ValueError("sharded gradients are summed immediately: single lanes cannot be observed")

    def discard(self) -> None:
        """Discard the gradients of the current step. Independent."""
        self._made = 0
        for _, p in self.named:
            p.grad = None

    def step(self, lr: float, tokens: int, limit: float = math.inf) -> StepStats:
        """Scale, clip and update like Synchronous.step, but on shards. The squared norms of the ranks' shards are added in order
        of ranks, so every rank gets the same bits. Collective over compute_comm."""
        self.reducer.observers.enter("reduce")
        reshard_all(self.model)
        gradients = [shard_of(grad).tensor for _, p in self.named if (grad := p.grad) is not None]  # dummy passes included
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
        # level 3: one gather before each forward and each backward pass; level 2: one per step. Both: one sum per backward pass
        gathers = 2 * self._most if self.level == 3 else 1
        self.reducer.transport.sent_bytes += self._sent_bytes * (self._most + gathers)
        self.reducer.observers.enter("publish")
        return StepStats(grad_norm=norm, skipped=skipped)

    def _norm(self, gradients: list[Tensor]) -> float:
        here = self._parts.counts if self._parts else lambda name: True
        known = [one for (name, _), one in zip(self.named, gradients, strict=True) if one.numel() and here(name)]
        mine = sum_in_order(float(torch.linalg.vector_norm(one, dtype=torch.float64)) ** 2 for one in known)
        rows = np.zeros(self.compute_comm.size)
        rows[self.compute_comm.rank] = mine
        self.group.wait(self.compute_comm.Iallgather(MPI.IN_PLACE, rows))
        squares = sum_in_order(rows.tolist())
        return self._parts.grid.norm([torch.tensor([squares], dtype=torch.float64)]) if self._parts else math.sqrt(squares)

    def drain(self) -> None:
        """Do nothing: no update is in flight between steps. Independent."""

    def flats(self) -> dict[str, Tensor]:
        """Return {}, because no tensor is replicated. Independent."""
        return {}

    def held(self) -> dict[str, int]:
        """Return the bytes of memory in use for each purpose: parameters, gradients, optimizer. Independent."""
        local = [shard_of(p).tensor for _, p in self.named]
        gradients = [shard_of(p.grad).tensor for _, p in self.named if p.grad is not None]
        moments = [one for row in self.optimizer.state for one in row.values()]
        return bytes_by_use(parameters=local, gradients=gradients, optimizer=moments)

    def state_dict(self) -> dict[str, Entry]:
        """Return this rank's rows of the optimizer state. Independent."""
        found: dict[str, Entry] = {}
        for (name, p), state in zip(self.named, self.optimizer.state, strict=True):
            part = shard_of(p)
            found |= {f"{name}/{key}": Entry(value, "sharded", part.at, tuple(p.shape)) for key, value in state.items()}
            if "exp_avg" in state:
                found[f"{name}/step"] = Entry(torch.tensor(float(self.optimizer.updates)))
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the boxes that state_dict returns. Independent."""
        own = {name: value for name, value in state.items() if not name.startswith("reducer/")}
        self.reducer.load_state_dict({name.removeprefix("reducer/"): state[name] for name in state if name not in own})
        load_boxes(own, self.state_dict(), self.optimizer)

    def release(self) -> None:
        """Do nothing. Independent."""

    def close(self) -> None:
        """Free parameters and state. Collective over compute_comm."""
        unshard_for_good()
        self.group.close()

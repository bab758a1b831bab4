"""Data parallelism in a plain PyTorch loop, with the strategies, reducers and compression of mpidp.train.

    import mpidp.library as mpidp
    items = mpidp.from_dataset(dataset, batch=64, seed=0)                      # in place of a DataLoader
    optimizer = mpidp.DataParallel(model, torch.optim.AdamW(model.parameters(), 3e-3), items)
    for epoch in range(20):
        for images, labels in optimizer.micro_batches():                       # micro-batches of this rank
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            optimizer.backward(loss)                                           # in place of loss.backward()
            optimizer.step()

Start this program with `mpirun -np N python -m mpi4py program.py`. With the default settings, N ranks compute the same bits as
one rank. See docs/library.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn

from mpidp.checkpoint.local_parameters import weights_sha256
from mpidp.comm.nccl import open_transport
from mpidp.comm.slices import sum_in_order
from mpidp.config import resolve, rules
from mpidp.config.command_line import from_args
from mpidp.config.schema import Config
from mpidp.data.dataset import Items
from mpidp.data.dataset import from_dataset as from_dataset
from mpidp.data.lanes import Lanes
from mpidp.errors import UsageError
from mpidp.model.own import set_generator
from mpidp.model.shape import CustomShape
from mpidp.parallel.engine import dropout_key
from mpidp.parallel.grid import make_grid
from mpidp.reducers import overlap
from mpidp.runtime.agreement import check_agreement, parameter_facts, versions
from mpidp.runtime.device import resolve_threads
from mpidp.runtime.topology import Topology
from mpidp.runtime.world import raise_together, start_mpi
from mpidp.strategies import strategy_of
from mpidp.strategies.protocol import StepStats, StrategyOptions
from mpidp.strategies.torch_rule import TorchRule
from mpidp.training.data_parallel import share_memory


@dataclass(frozen=True)
class SharingPlan:
    """The object that is passed to share_memory(). It implements the protocol MemoryRequest (training/data_parallel.py)."""

    config: Config
    mesh: Topology
    lanes: Lanes
    device: torch.device
    shape: CustomShape

    @property
    def world(self) -> MPI.Intracomm:
        return self.mesh.dp


class DataParallel:
    """Trains a model on all ranks with data parallelism. It replaces the optimizer in a training loop."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer], items: Items,
        settings: Mapping[str, Any] | None = None, steps: int = 0, clip: float = 0.0, threads: int = 0,
        comm: MPI.Intracomm | None = None,
    ) -> None:
        """Broadcast rank 0's parameters and buffers, and set up the strategy.

        `optimizer`: a torch.optim optimizer, or a function that makes one from model.parameters(). `items`: the result of
        from_dataset. The seed of `items` also seeds the random numbers of forward, such as dropout. `settings`: settings of
        the sections `strategy` and `comm` of mpidp.train, as {"section.key": value}. `steps`: total number of updates, which
        is required if the strategy does not synchronize at each step. Such a strategy synchronizes the models at the last
        step. `clip`: largest gradient norm, or 0 for no clipping. `threads`: CPU threads per rank, or 0 for as many as with
        train.threads=0. `comm`: the ranks (default: COMM_WORLD). Raises UsageError if a setting, the model or the optimizer is
        not supported. Collective over comm.
        """
        mesh = make_grid(comm or start_mpi()).replicas
        self.model, self.items, self.comm, self.lanes = model, items, mesh.dp, items.lanes
        self.rank, self.ranks, self._total = mesh.dp.rank, mesh.dp.size, steps
        with raise_together(self.comm):
            config = self._config(settings or {}, threads, mesh)
            self.optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(model.parameters())
            named = self._named()
        check_agreement(self.comm, parameter_facts(named) | {
            "dataset": str(items.state_dict() | asdict(items.lanes)), "settings": str([asdict(config), steps, clip]),
        } | versions())  # fmt: skip
        torch.set_num_threads(config.train.threads)
        device = named[0][1].device
        transport = open_transport(config.comm.gpu, device, self.comm)
        shape = CustomShape(0, 0, "", {}, [(name, list(p.shape)) for name, p in named])
        shared = share_memory(SharingPlan(config, mesh, items.lanes, device, shape), transport, sum(p.numel() for _, p in named))
        self._transport, self._balance = transport, shared.balance
        options = StrategyOptions.of(asdict(config.strategy), steps, mesh.node_sizes)
        self.strategy = strategy_of(config.strategy.name, config.strategy.quorum)(
            self.comm, shared.group, named, shared.reducer, TorchRule(self.optimizer), clip,
            self.lanes.global_batch, int(config.comm.bucket_mb * 2**20), False, options=options,
        )
        for tensor in [*model.buffers(), *(p.data for p in model.parameters() if not p.requires_grad)]:
            tensor.copy_(self.comm.bcast(tensor.cpu()))
        self.strategy.start()
        overlap.choose(shared.reducer, config.comm.overlap, self.comm, shared.balance.static)
        self._own_micro_batches = [v for lane in shared.balance.ranges[self.rank] for v in self.lanes.micro_batches(lane)]
        self.steps = 0  # number of updates made
        self.stats = StepStats(0.0, False)  # the gradient norm of the last update, and whether it was skipped
        self.loss = 0.0  # mean over the last batch; only over this rank's items if the strategy does not always synchronize
        self._remaining: list[int] = []  # this rank's micro-batches that still need backward()
        self._updated = True  # whether step() has made the update for the batch
        self._loss_sums = np.zeros((2, self.lanes.num_micro_batches))  # per micro-batch: sum of losses, number of items

    def _config(self, settings: Mapping[str, Any], threads: int, mesh: Topology) -> Config:
        for key in settings:
            if not key.startswith(("strategy.", "comm.")) or key in ("comm.copies", "strategy.replay"):
                raise UsageError(f"`settings` has the key {key!r}, but DataParallel supports only settings of the sections "
                                 "strategy and comm, except comm.copies and strategy.replay")
        arguments = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
        config = from_args([*arguments, "--comm.copies=rank"])
        if config.strategy.name == "server":
            raise UsageError("strategy.name=server is not supported by DataParallel, because the state of a torch.optim "
                             "optimizer cannot be split over servers. Use mpidp.train")
        if resolve.kind_of(config) != "synchronous" and not self._total:
            raise UsageError(f"{rules.method_setting(config.strategy.name, config.strategy.quorum)} does not synchronize at each "
                             "step, so it needs the number of steps. Call DataParallel(..., steps=EPOCHS * len(items))")
        if self.ranks > self.lanes.num_lanes:
            raise UsageError(f"{self.ranks} ranks need at least as many lanes (groups of micro-batches), but a batch has only "
                             f"{self.lanes.num_lanes}. Start fewer ranks, or pass a smaller micro_batch to from_dataset")
        lanes = self.lanes
        config = config.with_values(train={
            "steps": self._total, "global_batch": lanes.global_batch, "micro_batch": lanes.micro_batch, "seed": self.items.seed,
        })  # fmt: skip
        resolved = resolve.resolve(
            config, len(self.items), lanes, resolve_threads(threads, mesh), torch.device("cpu"), torch.float32
        )
        return replace(resolved, run=Config().run)

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if not named:
            raise UsageError("the model has no parameter with requires_grad=True")
        for name, p in named:
            if p.dtype != torch.float32 or p.device != named[0][1].device:
                raise UsageError(f"parameter {name} is {p.dtype} on {p.device}, but all parameters must be float32 on one "
                                 "device. Use torch.autocast for lower precision")
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise UsageError("LBFGS is not supported, because it computes the loss several times per update")
        optimized = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if optimized - {id(p) for p in self.model.parameters()}:
            raise UsageError("the optimizer has parameters that are not in the model, so their gradients would not be averaged")
        return named

    def micro_batches(self) -> Iterator[Any]:
        """Yield this rank's micro-batches of the rest of the epoch. Each is a value that the collate function of `items`
        returned. torch's generator is seeded for each micro-batch, so dropout does not depend on the rank. Raises UsageError if
        the loop does not call backward() and step(). Collective over comm: all ranks must iterate to the end."""
        items = self.items
        epoch = items.next_batch // len(items)
        while items.next_batch // len(items) == epoch:
            if not self._updated:
                self.strategy.discard()  # the caller left an earlier loop in the middle of this batch
            batch, self._remaining, self._updated = items.next_batch, list(self._own_micro_batches), False
            self._loss_sums[:] = 0.0
            while self._skip_empty():
                left, v = len(self._remaining), self._remaining[0]
                _, found = items.read(batch, v)
                set_generator(dropout_key(items.seed, batch, v), self.strategy.flat.device)
                yield found
                if len(self._remaining) == left:
                    raise UsageError("backward() was not called for a micro-batch, so its items would be skipped")
            if not self._updated:
                if any(items.count(batch, v) for v in self._own_micro_batches):
                    raise UsageError("step() was not called for a batch. Call it after every backward()")
                self.step()  # this rank has no items of the batch

    def _skip_empty(self) -> bool:
        """Skip empty micro-batches, which only the last batch of an epoch has. Return whether a micro-batch remains."""
        while not self._updated and self._remaining and not self.items.count(self.items.next_batch, self._remaining[0]):
            with self.strategy.micro_batch(self._remaining[0], len(self._remaining) == 1):
                self._remaining.pop(0)
        return bool(self._remaining)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing, because gradients are cleared at the start of each batch. Independent."""

    def backward(self, loss: Tensor, count: int | None = None) -> None:
        """Compute gradients. Call backward() once per micro-batch, in place of loss.backward(). Independent.

        `loss`: the mean over the items of the micro-batch, or over `count` other units, such as tokens. `count`: the number of
        these units, or None for items. Raises UsageError if backward() is called twice for a micro-batch, or if p.grad was
        replaced.
        """
        if not self._remaining:
            raise UsageError("backward() was called twice for one micro-batch. Add the losses and call it once")
        v, batch = self._remaining[0], self.items.next_batch
        count, parameters = self.items.count(batch, v) if count is None else count, self.strategy.parameters
        with self.strategy.micro_batch(v, len(self._remaining) == 1):
            self._remaining.pop(0)
            if count:
                before = [p.grad for p in parameters]
                (loss * (count / self.lanes.global_batch)).backward()
                if any(one is None or p.grad is not one for p, one in zip(parameters, before, strict=True)):
                    raise UsageError("p.grad was replaced. Call zero_grad() of DataParallel, not of the model or its optimizer")
                self._loss_sums[:, v] = loss.item() * count, count

    def step(self) -> bool:
        """Update the parameters if backward() has been called for all of this rank's micro-batches of the batch. Otherwise do
        nothing. Return whether this call completed the batch. Collective over comm if the strategy synchronizes at this step."""
        if self._updated or self._skip_empty():
            return False
        strategy = self.strategy
        if strategy.synchronizes_always:
            strategy.group.wait(self.comm.Iallreduce(MPI.IN_PLACE, self._loss_sums))
        losses, counts = self._loss_sums.tolist()
        self.loss = sum_in_order(losses) / max(1.0, sum(counts))
        self.stats = strategy.step(0.0, int(sum(counts)))
        self._updated = True
        self.items.next_batch += 1
        self.steps += not self.stats.skipped
        if self.steps == self._total:
            strategy.drain()
        return True

    def sha256(self) -> str:
        """Return the SHA-256 of all parameters. Independent."""
        return weights_sha256(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state. This method does not communicate, but all ranks must call it between the same two batches,
        after a step at which the strategy synchronized the ranks.

        With strategy.name=synchronous and no compression, all ranks have the same state, and any number of ranks can load it.
        Otherwise each rank must save and load its own state.
        """
        own = {name: entry.tensor.clone() for name, entry in self.strategy.state_dict().items()}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "strategy": own,
                "items": self.items.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of state_dict(). Call this before the first micro-batch. Raises UsageError if the dataset has changed.
        Independent."""
        self.items.load_state_dict(state["items"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # torch would use the tensors of `state`
        self.strategy.load_state_dict(state["strategy"])
        self.steps = state["steps"]

    def close(self) -> None:
        """Free shared memory. The model keeps its parameters. At the end of a program, this call is not needed. Collective over
        comm."""
        kept = [p.detach().clone() for p in self.strategy.parameters]
        self._balance.close()
        self.strategy.close()
        self._transport.close()
        for p, values in zip(self.strategy.parameters, kept, strict=True):
            p.data, p.grad = values, None

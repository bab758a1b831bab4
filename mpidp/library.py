"""Data parallelism in a plain PyTorch loop, with the strategies, reducers and compression of mpidp.train.

    import mpidp.library as mpidp
    items = mpidp.from_dataset(dataset, batch=64, seed=0)                      # in place of a DataLoader
    optimizer = mpidp.DataParallel(model, torch.optim.AdamW(model.parameters(), 3e-3), items)
    for epoch in range(20):
        for images, labels in optimizer.micro_batches():                       # this rank's, in place of the loader
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            optimizer.backward(loss)                                           # in place of loss.backward()
            optimizer.step()

`mpirun -np N python -m mpi4py program.py`. What comes out of N ranks is what comes out of one: bit for bit with the default
settings, since lanes are added in an order of their own (comm/tree.py). docs/library.md says more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn

from mpidp.checkpoint.local_parameters import weights_sha256
from mpidp.comm.nccl import open_transport
from mpidp.config import resolve, rules
from mpidp.config.command_line import from_args
from mpidp.config.schema import Config
from mpidp.data.dataset import Items
from mpidp.data.dataset import from_dataset as from_dataset
from mpidp.data.lanes import Lanes
from mpidp.errors import UsageError
from mpidp.model.own import set_generator
from mpidp.model.shape import OwnShape
from mpidp.parallel.engine import dropout_key
from mpidp.parallel.grid import make_grid
from mpidp.reducers import overlap
from mpidp.reducers.buckets import FlatLayout
from mpidp.runtime.agreement import agree, parameters_told, versions
from mpidp.runtime.device import resolve_threads
from mpidp.runtime.topology import Mesh
from mpidp.runtime.world import start_mpi, together
from mpidp.strategies import strategy_of
from mpidp.strategies.protocol import Options, StepStats
from mpidp.training.data_parallel import share_memory


class Given:
    """A torch.optim optimizer as it is, behind the calls that strategies make of ours: it is stepped on the averaged gradient,
    with the learning rate that it has. Its state it keeps itself. Independent."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, layout: FlatLayout, parameters: Tensor, gradients: Tensor, **more: Any
    ) -> None:
        self.optimizer, self.updates = optimizer, 0
        self._gradients = [(p, view) for (_, _, p), view in zip(layout.placed(), layout.views(gradients), strict=True)]

    def step(self, lr: float) -> None:
        """Every rank updates all parameters."""
        held = [p.grad for p, _ in self._gradients]
        for p, view in self._gradients:
            p.grad = view
        self.optimizer.step()
        for (p, _), gradient in zip(self._gradients, held, strict=True):
            p.grad = gradient
        self.updates += 1

    def go_on_after(self, updates: int) -> None:
        """So many updates were made."""
        self.updates = updates

    def moments(self) -> dict[str, Tensor]:
        """Nothing that strategies keep."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing that strategies keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing that strategies keep."""


@dataclass(frozen=True)
class LoopMemory:
    """What share_memory needs to know (training/data_parallel.py)."""

    config: Config
    mesh: Mesh
    lanes: Lanes
    device: torch.device
    shape: OwnShape

    @property
    def world(self) -> MPI.Intracomm:
        return self.mesh.dp


class DataParallel:
    """A model and its optimizer, trained together by all ranks; in the loop it stands where the optimizer stood."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer], items: Items,
        settings: Mapping[str, Any] | None = None, steps: int = 0, clip: float = 0.0, threads: int = 0,
        comm: MPI.Intracomm | None = None,
    ) -> None:
        """optimizer: of torch.optim or like it, or what makes one of model.parameters(). items: from_dataset's, whose seed is
        that of what forward draws, too. settings: of sections strategy and comm, as mpidp.train has them.
        steps: updates in all, which strategies need whose ranks do not meet at every step: at the last one there is one common
        model. clip: largest gradient norm, 0: off. threads: as train.threads. All ranks get rank 0's parameters and buffers.
        UsageError. Collective over comm (COMM_WORLD)."""
        mesh = make_grid(comm or start_mpi()).replicas
        self.model, self.items, self.comm, self.lanes = model, items, mesh.dp, items.lanes
        self.rank, self.ranks, self._total = mesh.dp.rank, mesh.dp.size, steps
        with together(self.comm):
            config = self._config(settings or {}, threads, mesh)
            self.optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(model.parameters())
            named = self._named()
        agree(self.comm, parameters_told(named) | {
            "dataset": str(items.state_dict() | asdict(items.lanes)), "settings": str([asdict(config), steps, clip]),
        } | versions())  # fmt: skip
        torch.set_num_threads(config.train.threads)
        device = named[0][1].device
        transport = open_transport(config.comm.gpu, device, self.comm)
        shape = OwnShape(0, 0, "", {}, [(name, list(p.shape)) for name, p in named])
        shared = share_memory(LoopMemory(config, mesh, items.lanes, device, shape), transport, sum(p.numel() for _, p in named))
        self._transport, self._balance = transport, shared.balance
        options = Options.of(asdict(config.strategy), steps, mesh.node_sizes)
        self.strategy = strategy_of(config.strategy.name, config.strategy.quorum)(
            self.comm, shared.group, named, shared.reducer, partial(Given, self.optimizer), clip, self.lanes.global_batch,
            int(config.comm.bucket_mb * 2**20), False, options=options,
        )
        for tensor in [*model.buffers(), *(p.data for p in model.parameters() if not p.requires_grad)]:
            tensor.copy_(self.comm.bcast(tensor.cpu()))
        self.strategy.start()
        overlap.choose(shared.reducer, config.comm.overlap, self.comm, shared.balance.settled)
        self._mine = [v for lane in shared.balance.ranges[self.rank] for v in self.lanes.micro_batches(lane)]
        self.steps = 0  # updates made
        self.stats = StepStats(0.0, False)  # of the last update: grad_norm, skipped
        self.loss = 0.0  # mean over the last batch; of this rank's part of it where ranks do not meet at every step
        self._left: list[int] = []  # of this batch's micro-batches, those before whose backward this rank stands
        self._updated = True  # is the batch's update made?
        self._told = np.zeros((2, self.lanes.num_micro_batches))  # of each: loss sum, and of how many it is

    def _config(self, settings: Mapping[str, Any], threads: int, mesh: Mesh) -> Config:
        for key in settings:
            if not key.startswith(("strategy.", "comm.")) or key in ("comm.copies", "strategy.replay"):
                raise UsageError(f"settings has {key!r}: a loop of your own takes those of sections strategy and comm, but for "
                                 "comm.copies and strategy.replay")
        words = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
        config = from_args([*words, "--comm.copies=rank"])
        if config.strategy.name == "server":
            raise UsageError("strategy.name=server: servers hold slices of an optimizer's state, and it is not known how to cut "
                             "that of the one given here. mpidp.train has it")
        if resolve.kind_of(config) != "synchronous" and not self._total:
            raise UsageError(f"{rules.asked(config.strategy.name, config.strategy.quorum)}: its ranks do not meet at every "
                             "step, so it must know how many there will be: DataParallel(..., steps=EPOCHS * len(items))")
        if self.ranks > self.lanes.num_lanes:
            raise UsageError(f"{self.ranks} ranks, but a batch has {self.lanes.num_lanes} lanes, and each computes whole lanes: "
                             "start fewer, or give from_dataset a smaller micro_batch")
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
            raise UsageError("the model has no parameter that requires a gradient")
        for name, p in named:
            if p.dtype != torch.float32 or p.device != named[0][1].device:
                raise UsageError(f"parameter {name} is {p.dtype} on {p.device}: all must be float32, on one device; "
                                 "torch.autocast casts in products")
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise UsageError("LBFGS computes the loss several times an update: no gradient of one batch would do")
        theirs = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if theirs - {id(p) for p in self.model.parameters()}:
            raise UsageError("the optimizer has parameters that are not of this model: they would stay as they are on each rank")
        return named

    def micro_batches(self) -> Iterator[Any]:
        """What is left of the epoch, this rank's part: micro-batches as collate gives them. torch's generator is at a place of
        its own in each, so dropout and masks belong to the data and not to a rank. UsageError in a loop that leaves out backward
        or step. Collective over comm: every rank must go through all of them."""
        items = self.items
        epoch = items.next_batch // len(items)
        while items.next_batch // len(items) == epoch:
            if not self._updated:
                self.strategy.discard()  # a loop that was left in the middle of this batch
            batch, self._left, self._updated = items.next_batch, list(self._mine), False
            self._told[:] = 0.0
            while self._pass_empty():
                left, v = len(self._left), self._left[0]
                _, found = items.read(batch, v)
                set_generator(dropout_key(items.seed, batch, v), self.strategy.flat.device)
                yield found
                if len(self._left) == left:
                    raise UsageError("a micro-batch went by without backward(): its items would be left out")
            if not self._updated:
                if any(items.count(batch, v) for v in self._mine):
                    raise UsageError("the batch went by without step(): call it after every backward()")
                self.step()  # none of its items was this rank's

    def _pass_empty(self) -> bool:
        """Past micro-batches without items, of an epoch's last batch. Is there another one?"""
        while not self._updated and self._left and not self.items.count(self.items.next_batch, self._left[0]):
            with self.strategy.micro_batch(self._left[0], len(self._left) == 1):
                self._left.pop(0)
        return bool(self._left)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: gradients are cleared when a batch begins. Independent."""

    def backward(self, loss: Tensor, count: int | None = None) -> None:
        """loss: a mean over the micro-batch's items, or over `count` of anything else (tokens): the update is by the mean over
        all of the batch. Once a micro-batch. UsageError. Independent."""
        if not self._left:
            raise UsageError("backward() a second time for one micro-batch: add the losses, and call it once")
        v, batch = self._left[0], self.items.next_batch
        count, parameters = self.items.count(batch, v) if count is None else count, self.strategy.parameters
        with self.strategy.micro_batch(v, len(self._left) == 1):
            self._left.pop(0)
            if count:
                held = [p.grad for p in parameters]
                (loss * (count / self.lanes.global_batch)).backward()
                if any(one is None or p.grad is not one for p, one in zip(parameters, held, strict=True)):
                    raise UsageError("gradients were taken from their place: call zero_grad of DataParallel, not of the model")
                self._told[:, v] = loss.item() * count, count

    def step(self) -> bool:
        """The update, once all of this rank's micro-batches are in; before, nothing. Returns whether it was made. Collective over
        comm where the strategy's ranks meet."""
        if self._updated or self._pass_empty():
            return False
        strategy = self.strategy
        if strategy.meets_always:
            strategy.group.wait(self.comm.Iallreduce(MPI.IN_PLACE, self._told))
        losses, counts = self._told.tolist()
        self.loss = sum(losses) / max(1.0, sum(counts))
        self.stats = strategy.step(0.0, int(sum(counts)))
        self._updated = True
        self.items.next_batch += 1
        self.steps += not self.stats.skipped
        if self.steps == self._total:
            strategy.finish()
        return True

    def sha256(self) -> str:
        """Of the parameters, in order of names. Independent."""
        return weights_sha256(self.model)

    def state_dict(self) -> dict[str, Any]:
        """This rank's, between two batches at a meeting. With strategy.name=synchronous and no compression all hold the same, and
        rank 0's serves any number of ranks; else each must save and load its own. Independent, at the same step on all ranks."""
        own = {name: entry.tensor.clone() for name, entry in self.strategy.state_dict().items()}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "strategy": own,
                "items": self.items.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, before the first micro-batch. UsageError. Independent."""
        self.items.load_state_dict(state["items"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # torch would go on in the very tensors
        self.strategy.load_state_dict(state["strategy"])
        self.steps = state["steps"]

    def close(self) -> None:
        """Give shared memory back: the model is an ordinary one from here on. Not needed at a program's end. Collective over
        comm."""
        kept = [p.detach().clone() for p in self.strategy.parameters]
        self._balance.close()
        self.strategy.close()
        self._transport.close()
        for p, values in zip(self.strategy.parameters, kept, strict=True):
            p.data, p.grad = values, None

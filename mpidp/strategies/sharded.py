"""Synchronous data parallelism with sharded gradients and optimizer state (mesh.shard=2; ZeRO-2, Rajbhandari 2020). With
mesh.shard=3 (ZeRO-3), the parameters are sharded, too.

A unit is a group of parameters that are exchanged together, such as those of one Transformer block. Each rank owns one slice
of every unit. During the backward pass of a micro-batch, each slice of a unit's gradient is sent to its owner, and the
gradient is freed. Owners add gradients in the order of a fixed binary tree, so the weights equal those of mesh.shard=0 bit for
bit. With mesh.shard=3, the parameters of a Transformer block are gathered before its forward pass and before its backward pass
(gathered.py).

Exchanges are collective, so all ranks make them in the same order. The micro-batches are dealt to the ranks in turn. At the
end of a step, some ranks may have no micro-batch, or an empty one. These ranks make the exchanges without computing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.local_parameters import bytes_by_use, load_boxes
from mpidp.comm.group import Group
from mpidp.comm.slices import ALIGN, round_up
from mpidp.parallel.model_part import ModelPartition
from mpidp.reducers.base import LaneObserver, Reducer
from mpidp.reducers.buckets import FlatLayout, unit_of
from mpidp.reducers.sharded_sum import ShardedSum
from mpidp.reducers.units import Channel, Unit, units_of
from mpidp.strategies.gathered import UnitParameters
from mpidp.strategies.optimizer import RunOfElements, ShardedOptimizer, UpdateRule
from mpidp.strategies.protocol import StepStats, StrategyOptions
from mpidp.strategies.sharded_norm import ShardedNorm, ShardedNormBySlices


@dataclass
class UnitExchange:
    """The exchanges of a backward pass for one unit. If the parameters of a Transformer block are divided, they are first
    gathered. Then the gradients of the unit are reduced."""

    name: str
    unit: Unit | None  # None: the block has only frozen parameters
    waits_for: set[str]  # names of parameters without a gradient so far; of a frozen block, its own name

    @classmethod
    def of(cls, name: str, unit: Unit | None) -> UnitExchange:
        """Return a `UnitExchange` object for a new backward pass. `name`: the name of the unit. Pure."""
        return cls(name, unit, {name} if unit is None else {member.name for member in unit.members})


class Sharded:
    """Synchronous data parallelism on a sharded model (mesh.shard=2|3)."""

    survives_failures = False  # a shard is lost with the rank that holds it
    synchronizes_always = True
    buffer: Any = None  # there is no flat gradient buffer

    def __init__(
        self, comm: MPI.Intracomm, group: Group, named_parameters: list[tuple[str, torch.nn.Parameter]], reducer: Reducer,
        rule: UpdateRule, clip: float, nominal_tokens: int, bucket_bytes: int, one_copy: bool,
        spare_slots: int = 0, most_slots: int = 0, options: StrategyOptions | None = None, parts: ModelPartition | None = None, *,
        model: Any, level: int,
    ) -> None:
        """Take the arguments of Synchronous. Of `reducer`, only the attributes `lanes`, `transport` and `observers` are used.
        `model`: the model, which is moved to the device. `level`: 2 divides the gradients and the optimizer state among the
        ranks, and 3 also the parameters of each Transformer block. Collective over rule.hidden.comm."""
        self.compute_comm, self.group, self.reducer, self.one_copy = comm, group, reducer, False
        self.clip, self.nominal_tokens, self._parts = clip, nominal_tokens, parts
        device, channel = reducer.transport.device, Channel(comm, reducer.transport, group.wait)
        chunk_of = parts.part.chunk_of if parts is not None else lambda name: 0
        blocks = {f"blocks.{layer}": block for layer, block in model.blocks.items()} if level == 3 else {}
        trained, named = {name for name, _ in named_parameters}, list(model.named_parameters())
        frozen = [(name, p) for name, p in named if name not in trained and unit_of(name) in blocks]
        self._channel, self._layout = channel, FlatLayout(named_parameters)
        self.units = units_of(self._layout, comm.size, chunk_of)
        more = units_of(FlatLayout(frozen), comm.size, chunk_of, len(self.units)) if frozen else []
        self.parameters = UnitParameters([*self.units, *more], blocks, channel, device)
        model.to(device)  # the buffers and the other frozen parameters
        self.sum = ShardedSum(self.units, reducer.lanes, channel, device)
        kind = ShardedNormBySlices if parts is not None and parts.norm_by_slices is not None else ShardedNorm
        self._norm: ShardedNorm = kind(self.units, self._layout, channel, parts)  # type: ignore[arg-type]
        without_padding = rule.matrices if rule.padded else set(trained)
        self.optimizer = ShardedOptimizer(rule, self._runs(without_padding))
        self._blocks = [(name, chunk_of(f"{name}.")) for name in blocks]
        self._plans = self._plan(dict.fromkeys(unit_of(name) for name, _ in reversed(named)))
        self._queue: list[UnitExchange] = []  # what this micro-batch's backward must still do, in order
        self._v, self._observers = 0, list[LaneObserver]()  # the micro-batch, and who sees its gradient
        self._hooks = [
            member.parameter.register_post_accumulate_grad_hook(partial(self._complete, unit, member.name))
            for unit in self.units for member in unit.members
        ]
        for name, block in blocks.items():
            self._hooks.append(block.register_forward_pre_hook(lambda *_, name=name: self.parameters.gather(name)))
            self._hooks.append(block.register_forward_hook(partial(self._computed, name)))

    def _plan(self, names: Iterable[str]) -> dict[int, list[tuple[str, Unit | None]]]:
        """Return {chunk: exchanges of its backward pass}. An exchange is (name of a unit, unit). The unit is None if its
        parameters are frozen. Blocks before the first trained parameter have no exchange, because they need no backward pass.
        `names`: the names of units, in the order of backward."""
        chunks, found = dict(self._blocks), dict[int, list[tuple[str, Unit | None]]]()
        for name in names:
            units = [unit for unit in self.units if unit.name == name]
            for unit in units:
                found.setdefault(unit.chunk, []).append((name, unit))
            if name in chunks and not units:
                found.setdefault(chunks[name], []).append((name, None))
        for plan in found.values():
            while plan and plan[-1][1] is None:
                plan.pop()
        return found

    def _runs(self, unpadded: Collection[str]) -> list[RunOfElements]:
        """Return the elements that this rank updates. The zeros after a parameter are updated together with the parameter (see
        UpdateRule), unless its name is in `unpadded`."""
        rank, found = self.compute_comm.rank, []
        for unit, gradient in zip(self.units, self.sum.totals, strict=True):
            owned = self.parameters.owned[unit.index]
            for member in unit.members:
                run, shape = unit.run(member, rank), tuple(member.parameter.shape)
                if run:
                    ends = (run.start - member.offset, run.stop - member.offset)
                    start, length = run.start - unit.parts[rank].start, len(run)
                    length = length if member.name in unpadded else round_up(length, ALIGN)
                    tensors = (one[start : start + length] for one in (owned, gradient))
                    found.append(RunOfElements(member.name, shape, *ends, *tensors))
        return found

    def _complete(self, unit: Unit, name: str, _: Tensor) -> None:
        """Called when backward has computed the gradient of a parameter. Reduce the units that are complete, in the planned
        order."""
        for one in self._queue:
            if one.unit is unit:
                one.waits_for.discard(name)
        while self._queue and not self._queue[0].waits_for:
            self._exchange_next()

    def _computed(self, name: str, block: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        """Called when forward has computed a block. Ask autograd to gather the block again before its backward pass."""
        if output.requires_grad and torch.is_grad_enabled():
            output.register_hook(lambda gradient: self._backward_reaches(name))

    def _backward_reaches(self, name: str) -> None:
        while self._queue and self._queue[0].name != name:
            self._exchange_next()
        self.parameters.gather(name)

    def _exchange_next(self) -> None:
        now = self._queue.pop(0)
        self.parameters.gather(now.name)  # on a rank that computes, it is gathered already
        if now.unit is not None:
            if now.unit is self.units[0] and self._observers and self._v < self.reducer.lanes.num_micro_batches:
                self._observe(now.unit.members[0].parameter)
            self.sum.reduce(now.unit)

    def _observe(self, first: torch.nn.Parameter) -> None:
        if first.grad is None:  # the micro-batch is empty
            first.grad = torch.zeros_like(first)
        for observe in self._observers:
            observe(self.reducer.lanes.lane_of(self._v), first.grad.view(-1))

    @contextmanager
    def micro_batch(self, v: int, last: bool, chunk: int = 0) -> Iterator[None]:
        """Return a context manager, in which the backward pass of micro-batch number `v` must run. Ranks may pass different
        numbers. `last`, `chunk`: see Synchronous. Raises RuntimeError if a parameter gets another gradient after the gradients
        of its unit were reduced. Collective over compute_comm."""
        self._queue, self._v = [UnitExchange.of(name, unit) for name, unit in self._plans.get(chunk, ())], v
        yield
        while self._queue:
            self._exchange_next()
        for unit in self.units:
            for member in unit.members:
                if unit.chunk == chunk and member.parameter.grad is not None:
                    raise RuntimeError(f"mesh.shard=2 or 3: backward has computed the gradient of {member.name} twice")

    def fill(self, forwards: int, chunk: int | None = None) -> None:
        """Take part in the communication of `forwards` forward passes that other ranks compute. `chunk`: the chunk of layers
        that these ranks compute, or None for all chunks. Collective over compute_comm."""
        for _ in range(forwards):
            for name, its_chunk in self._blocks:
                if chunk in (None, its_chunk):
                    self.parameters.gather(name)

    def synchronizes_at(self, step: int) -> bool:
        """Return True: all ranks synchronize at every step. Independent."""
        return True

    def start(self) -> None:
        """Do nothing, because all replicas already have equal weights. Independent."""

    def observe_lanes(self, observers: Sequence[LaneObserver]) -> None:
        """In the next step, call each observer once for every micro-batch, with the flattened gradient of the first parameter
        in flat order. Observers get only this part, because no rank has the whole gradient of a lane (sequence of
        micro-batches). Independent."""
        self._observers = list(observers)

    def discard(self) -> None:
        """Discard the gradients of the current step. Independent."""
        self.sum.discard()

    def step(self, lr: float, tokens: int, limit: float = math.inf) -> StepStats:
        """Do the same as Synchronous.step(), on this rank's slices. Collective over compute_comm."""
        observers = self.reducer.observers
        observers.enter("reduce")
        self._tie()
        scale, norm = self.nominal_tokens / max(1, tokens), 0.0
        if tokens:
            norm = self._norm(self.sum.totals) * scale
            if self.clip and norm > self.clip:
                scale *= self.clip / norm
        skipped = not (tokens and math.isfinite(norm) and norm <= limit)
        self.discard()
        if skipped:
            return StepStats(grad_norm=norm, skipped=True)
        observers.enter("apply")
        if scale != 1.0:
            for total in self.sum.totals:
                total.mul_(scale)
        self.optimizer.step(lr)
        observers.enter("publish")
        self.parameters.publish(self.units)
        return StepStats(grad_norm=norm, skipped=False)

    def _tie(self) -> None:
        """Add the gradients of the embedding and of the head, if they are one parameter that two pipeline stages hold. In both
        stages, this parameter is a unit by itself. So a rank owns the same elements of this unit in both stages."""
        name = self._parts.tied_name if self._parts is not None else ""
        for unit, total in zip(self.units, self.sum.totals, strict=True):
            if name and any(member.name == name for member in unit.members):
                assert self._parts is not None
                total.add_(self._parts.tied_gradient(total).to(total.device))

    def drain(self) -> None:
        """Do nothing: no update is in flight between steps. Independent."""

    def flats(self) -> dict[str, Tensor]:
        """Return {}, because the state is not replicated. Independent."""
        return {}

    def held(self) -> dict[str, int]:
        """Return {use: bytes of memory on this rank}. The uses are parameters, gradients and optimizer. Independent."""
        moments = [one for row in self.optimizer.state for one in row.values()]
        return bytes_by_use(
            parameters=[*self.parameters.whole, *self.parameters.owned], gradients=self.sum.slots, optimizer=moments
        )

    def state_dict(self) -> dict[str, Entry]:
        """Return the optimizer state of this rank's slices. A state tensor has the shape of its parameter, and an entry holds
        one rectangular block of this tensor. Independent."""
        rank, found = self.compute_comm.rank, dict[str, Entry]()
        states = {run.name: state for run, state in zip(self.optimizer.runs, self.optimizer.state, strict=True)}
        for unit in self.units:
            for member in unit.members:
                for key in self.optimizer.rule.states(member.name):
                    state = states[member.name][key] if member.name in states else torch.empty(0)
                    state = state[: len(unit.run(member, rank))]  # without padding
                    found |= unit.entries_of_run(member, state, rank, f"{member.name}/{key}")
                if "exp_avg" in self.optimizer.rule.states(member.name):
                    found[f"{member.name}/step"] = Entry(torch.tensor(float(self.optimizer.updates)))
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the entries that state_dict() returns. Raises ValueError for any other entry. Independent."""
        own = {name: value for name, value in state.items() if not name.startswith("reducer/")}
        self.reducer.load_state_dict({name.removeprefix("reducer/"): state[name] for name in state if name not in own})
        load_boxes(own, self.state_dict(), self.optimizer)

    def release(self) -> None:
        """Remove the autograd hooks. Independent."""
        for hook in self._hooks:
            hook.remove()

    def close(self) -> None:
        """Remove the autograd hooks, and free the communicators. Collective over compute_comm."""
        self.release()
        self.group.close()

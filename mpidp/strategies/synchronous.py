"""Exact synchronous data parallelism: each step averages the gradients of all micro-batches. Then all replicas make the same
update. (With comm.reducer=root, only rank 0 makes the update.)

theta <- update(theta, (sum over micro-batches of the gradients of token losses) / (number of tokens)). The gradient is the
mean over the tokens of the global batch. It is not a mean of the means of micro-batches or ranks. docs/equations.md explains
the formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.checkpoint.entry import Entry, Layout
from mpidp.checkpoint.local_parameters import bytes_by_use
from mpidp.comm.buffers import buf
from mpidp.comm.group import Group
from mpidp.comm.slices import slice_bounds
from mpidp.comm.transport import pieces
from mpidp.parallel.model_part import ModelPartition
from mpidp.reducers.base import LaneObserver, Reducer
from mpidp.reducers.buckets import GradientBuffer
from mpidp.runtime.environment import launched_with_ulfm
from mpidp.runtime.ulfm import commit, revoke
from mpidp.strategies.optimizer import Optimizer, UpdateRule, bounds_outside
from mpidp.strategies.protocol import StepStats, StrategyOptions


class Synchronous:
    """Synchronous data parallelism. Every step waits for the gradients of all ranks."""

    survives_failures = True
    synchronizes_always = True

    def __init__(
        self, comm: MPI.Intracomm, group: Group, named_parameters: list[tuple[str, torch.nn.Parameter]], reducer: Reducer,
        rule: UpdateRule, clip: float, nominal_tokens: int, bucket_bytes: int, one_copy: bool,
        spare_slots: int = 0, most_slots: int = 0, options: StrategyOptions | None = None, parts: ModelPartition | None = None,
    ) -> None:
        """`comm`: the ranks that hold the same part of the model. `group`: which ranks share memory. `rule`: how the optimizer
        updates parameters. `clip`: largest gradient norm, or 0 for no clipping. `nominal_tokens`: global_batch x seq_len. The
        loss is a sum over tokens divided by this number. `one_copy`: whether ranks that share memory use one copy of
        parameters and optimizer state together. If so, each of these ranks updates a part of the copy. `spare_slots`: number
        of gradient buffers in addition to those of the reducer. `most_slots`: number of gradient buffers that this rank may
        need after other ranks have failed. `parts`: this rank's part of the model, if mesh.tp or mesh.pp divides the model.
        Collective over comm. With `parts`, collective over parts.grid.world."""
        self.compute_comm, self.group, self.reducer, self.one_copy = comm, group, reducer, one_copy
        self.options = options or StrategyOptions.of()
        spare_slots += self.more_slots(self.options)
        self.parameters = [p for _, p in named_parameters]
        self.clip, self.nominal_tokens = clip, nominal_tokens
        device = self.parameters[0].device
        slots = reducer.num_slots + spare_slots
        room = max(slots, most_slots if device.type == "cpu" else 0)

        def memory(elements: int) -> Tensor:
            return group.common(elements, device) if one_copy else group.own(elements, device)

        self.buffer = GradientBuffer(
            named_parameters, slots, bucket_bytes, lambda elements: group.memory(elements, device, elements // slots * room),
            group.node.rank,
        )
        self._parts = parts
        # An update begins on all ranks or on none. So the ranks with other parts of the model agree, too.
        self._everyone = comm if parts is None else parts.grid.world
        if parts is not None:
            self.buffer.cut_chunks(parts.part.chunk_of, len(parts.part.chunks))
        reducer.attach(self.buffer)
        self._rule = rule
        self.survives_failures &= rule.hidden.comm.size == 1  # otherwise a failure can interrupt an update
        self.flat = memory(self.buffer.num_elements)
        self.buffer.layout.adopt(self.flat)
        self.optimizer: Optimizer | None = None  # with comm.reducer=root only rank 0 has an optimizer
        if (share := self.optimizer_share()) is not None:
            self.optimizer = rule.make(self.buffer.layout, self.flat, self.buffer.total, memory, **share)
        self._spare: list[Tensor] = []  # a copy of the shared tensors as they were before the update
        # If ranks that hold some part of the model share a copy, the ranks of all parts keep the state before the update, because
        # all ranks restore this state if an update is incomplete.
        if launched_with_ulfm() and self._everyone.allreduce(one_copy, op=MPI.LOR):
            self._spare = [memory(flat.numel()) for flat in self.flats().values()]
        self.torn = False  # whether the last update of shared tensors is incomplete because a rank failed
        self._late: MPI.Exception | None = None  # a failure that the next micro_batch() raises
        self._last = False
        self.buffer.on_full(lambda: self._last and reducer.overlaps(), reducer.begin)

    def optimizer_share(self) -> dict[str, Any] | None:
        """Return keyword arguments for the class `Optimizer`. The arguments state the share of the parameters that this rank
        updates. Return None if this rank updates nothing. Independent."""
        if not self.reducer.holds_sum:
            return None
        return {"share": (self.group.node.rank, self.group.node.size)} if self.one_copy else {}

    def bounds(self, count: int, multiple: int) -> list[int]:
        """Return the count + 1 bounds of `count` slices of the flat parameters. Each bound is divisible by `multiple`, or is
        the number of elements. No bound is inside a matrix whose update is a function of the whole matrix. Independent."""
        return bounds_outside(self.buffer.layout, count, multiple, self._rule.matrices)

    def more_slots(self, options: StrategyOptions) -> int:
        """Return the number of gradient buffers that the strategy needs in addition to those of the reducer. Independent."""
        return 0

    def resume_after_failure(self, before: Synchronous) -> None:
        """Take over the state of `before`. If a failure has interrupted the last update of `before`, first undo this update.
        Collective over compute_comm."""
        if before.torn:
            self._copy_share(before._spare, list(self.flats().values()))
        if self.optimizer is not None and before.optimizer is not None:
            self.optimizer.set_updates(before.optimizer.updates - before.torn)
        self.reducer.resume_from(before.reducer)
        if self.reducer.everyone_updates:
            self.group.fence()
        else:
            self.start()

    def release(self) -> None:
        """Remove the autograd hooks and stop the reducing thread. Independent."""
        self.buffer.forget()
        self.reducer.stop_worker()

    def synchronizes_at(self, step: int) -> bool:
        """Return whether all ranks synchronize at step number `step`. Independent."""
        return self.synchronizes_always or step % self.options.meet_every == 0 or step == self.options.total_steps

    def start(self) -> None:
        """Make the parameters of all replicas equal to those of rank 0. Collective over compute_comm."""
        self._spread([self.flat])

    def resume_with_new_ranks(self, before: Synchronous | None) -> None:
        """Broadcast the state that rank 0 has in `before`, the previous strategy. Collective over compute_comm."""
        updates = 0
        if before is not None and self.compute_comm.rank == 0:
            held = before._spare if before.torn else list(before.flats().values())
            for mine, theirs in zip(self.flats().values(), held, strict=True):
                mine.copy_(theirs)
            updates = before.optimizer.updates - before.torn if before.optimizer is not None else 0
        updates = self.compute_comm.bcast(updates)
        if self.optimizer is not None:
            self.optimizer.set_updates(updates)
        self._spread(list(self.flats().values()) if self.reducer.everyone_updates else [self.flat])
        self.reducer.resume_from(before.reducer if before is not None else None)

    def _spread(self, flats: list[Tensor]) -> None:
        """Broadcast rank 0's values of the tensors `flats`. Collective over compute_comm."""
        self.group.fence()
        for flat in flats:
            wire = flat.cpu()  # on the CPU this is flat itself
            for start, stop in pieces(0, wire.numel()):
                self.compute_comm.Bcast(buf(wire[start:stop]), root=0)  # ranks that share memory write the same values
            flat.copy_(wire)
        self.group.fence()

    @contextmanager
    def micro_batch(self, v: int, last: bool, chunk: int = 0) -> Iterator[None]:
        """Return a context manager, in which the backward pass of micro-batch number `v` must run. `last`: whether `v` is this
        rank's last micro-batch of the step. `chunk`: the group of layers that the pass computes. Independent."""
        if self._late is not None:
            raise self._late
        self._last = last
        self.reducer.open(v, last, chunk)
        yield
        self.reducer.close(v, chunk)
        self._last = False

    def observe_lanes(self, observers: Sequence[LaneObserver]) -> None:
        """In the next step, call each observer with the gradient of every lane (sequence of micro-batches) that this rank
        computes. Raises ValueError if the reducer does not store the gradients of single lanes. Independent."""
        self.reducer.observe_lanes(observers)

    def discard(self) -> None:
        """Discard the gradients of the current step. Independent."""
        self.reducer.discard()

    def step(self, lr: float, tokens: int, limit: float = math.inf) -> StepStats:
        """Sum the gradients, divide the sum by `tokens` to get the mean, clip it, and update. Skip the update if any gradient
        is not finite, or if the norm exceeds `limit`. All ranks compute the same norm, so they make the same decision.
        Collective over compute_comm."""
        self.reducer.observers.enter("reduce")
        scale, norm = self.nominal_tokens / max(1, tokens), 0.0
        with commit(self._everyone):  # no rank updates before the end of this block; then all remaining ranks update
            with self.reducer.observers.span("reduction"):
                self.reducer.finish()
            if self._parts is not None:
                self._parts.tie(self.buffer, self.group)
            self.reducer.observers.summed(self.buffer.total)
            if tokens:
                norm = self.reducer.norm() * scale
                if self.clip and norm > self.clip:
                    scale *= self.clip / norm
            skipped = not (tokens and math.isfinite(norm) and norm <= limit)  # tokens is 0 if no target has a loss
            if not skipped:
                self.reducer.scale(scale)
                self._copy_share(list(self.flats().values()), self._spare)
        self.reducer.end_round(applied=not skipped)
        if skipped:
            return StepStats(grad_norm=norm, skipped=True)
        self.reducer.observers.enter("apply")
        if self.optimizer is not None:
            self.optimizer.step(lr)
        self.reducer.observers.enter("publish")
        self._publish()
        return StepStats(grad_norm=norm, skipped=False)

    def _publish(self) -> None:
        """Make the updated parameters visible on all ranks. If ranks share parameters and a rank fails, the update is incomplete,
        and all ranks raise RankFailure. They later restore the state before the update. If ranks share no parameters, the update
        is complete even after a failure. In this case the next micro_batch() raises the failure, before it overwrites gradients
        that other ranks may still read. Collective over compute_comm."""
        if self._spare:
            self.torn = True
            with commit(self._everyone):
                self.reducer.publish(self.parameters)
            self.torn = False
            return
        try:
            self.reducer.publish(self.parameters)
        except MPI.Exception as failure:
            if not launched_with_ulfm():
                raise
            revoke()
            self._late = failure

    def _copy_share(self, source: list[Tensor], target: list[Tensor]) -> None:
        """Copy this rank's slice of each tensor from `source` to `target`. No communication, but the other ranks of the node must
        also call this method, to copy the other slices."""
        bounds = slice_bounds(self.flat.numel(), self.group.node.size)
        mine = slice(bounds[self.group.node.rank], bounds[self.group.node.rank + 1])
        for one, other in zip(source, target, strict=False):
            other[mine] = one[mine]

    def fill(self, forwards: int, chunk: int | None = None) -> None:
        """Do nothing, because ranks may compute different numbers of forward passes. Independent."""

    def flats(self) -> dict[str, Tensor]:
        """Return {suffix: flat tensor} of the tensors that must be equal on all replicas (see Strategy.flats()). Independent."""
        return {"": self.flat} | (self.optimizer.moments() if self.optimizer is not None else {})

    def held(self) -> dict[str, int]:
        """Return {use: bytes of memory}. The uses are parameters, gradients and optimizer. If ranks share memory, the bytes
        are those of the whole node. Independent."""
        moments = self.optimizer.moments().values() if self.optimizer is not None else []
        return bytes_by_use(parameters=[self.flat], gradients=[self.buffer.flat], optimizer=moments)

    def drain(self) -> None:
        """Do nothing: no update is in flight between steps. Independent."""

    def state_dict(self) -> dict[str, Entry]:
        """Return the optimizer state and the reducer's state. With comm.reducer=root, return {} on ranks other than 0.
        Independent."""
        if self.optimizer is None:
            return {}
        layout: Layout = "replicated" if self.reducer.everyone_updates else "sharded"
        found = {name: Entry(tensor, layout) for name, tensor in self.optimizer.state_dict().items()}
        return found | {f"reducer/{name}": entry for name, entry in self.reducer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state. Independent."""
        held = {name: value for name, value in state.items() if name.startswith("reducer/")}
        self.reducer.load_state_dict({name.removeprefix("reducer/"): value for name, value in held.items()})
        if self.optimizer is not None:
            self.optimizer.load_state_dict({name: value for name, value in state.items() if name not in held})

    def close(self) -> None:
        """Free the shared memory of parameters, gradients and state. Collective over compute_comm."""
        self.reducer.stop_worker()
        self.group.fence()
        if self.group.node.size > 1:
            for p in self.parameters:
                p.grad, p.data = None, torch.empty(0)
        self.group.close()

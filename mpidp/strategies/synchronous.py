"""Exact synchronous data parallelism: all lanes of a step are averaged, everybody (or the root) updates, all are equal.

theta <- update(theta, (sum over lanes of the gradients of token losses) / (number of tokens)): the mean over tokens of
the global batch, never a mean of means. docs/equations.md has the formula and its law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.buckets import GradientBuffer
from mpidp.comm.buffers import buf
from mpidp.comm.group import Group
from mpidp.comm.reducers import Look, Reducer
from mpidp.comm.transport import pieces
from mpidp.optim import Optimizer
from mpidp.state import Entry, Layout
from mpidp.strategies.protocol import StepStats


class Synchronous:
    """Every step waits for all lanes."""

    def __init__(
        self, comm: MPI.Intracomm, group: Group, named_parameters: list[tuple[str, torch.nn.Parameter]], reducer: Reducer,
        make_optimizer: Callable[..., Optimizer], clip: float, nominal_tokens: int, bucket_bytes: int, one_copy: bool,
        spare_slots: int = 0,
    ) -> None:
        """make_optimizer: all but the memory is given. clip: largest gradient norm, 0 for no clipping; nominal_tokens:
        global_batch x seq_len, by which losses were divided; one_copy: the ranks of a group share parameters and optimizer
        state, and each updates a part. Collective over comm."""
        self.compute_comm, self.group, self.reducer = comm, group, reducer
        self.parameters = [p for _, p in named_parameters]
        self.clip, self.nominal_tokens = clip, nominal_tokens
        device = self.parameters[0].device

        def memory(elements: int) -> Tensor:
            return group.common(elements, device) if one_copy else torch.zeros(elements, device=device)

        self.buffer = GradientBuffer(
            named_parameters, reducer.num_slots + spare_slots, bucket_bytes, lambda elements: group.memory(elements, device),
            group.node.rank,
        )
        reducer.attach(self.buffer)
        self.flat = memory(self.buffer.num_elements)
        self.buffer.layout.adopt(self.flat)
        share = (group.node.rank, group.node.size) if one_copy else (0, 1)
        self.optimizer: Optimizer | None = None  # under `root`, rank 0 alone has one
        if reducer.holds_sum:
            self.optimizer = make_optimizer(self.buffer.layout, self.flat, self.buffer.total, memory=memory, share=share)
        self._last = False
        self.buffer.on_full(lambda: self._last and reducer.overlaps(), reducer.begin)

    def start(self) -> None:
        """Make all replicas equal to rank 0's. Collective over compute_comm."""
        self.group.fence()
        wire = self.flat.cpu()  # the very memory, on the CPU
        for start, stop in pieces(0, wire.numel()):
            self.compute_comm.Bcast(buf(wire[start:stop]), root=0)  # of one copy, all receive the same
        self.flat.copy_(wire)
        self.group.fence()

    @contextmanager
    def micro_batch(self, v: int, last: bool) -> Iterator[None]:
        """Backward of micro-batch v runs inside. Independent."""
        self._last = last
        self.reducer.open(v, last)
        yield
        self.reducer.close(v)
        self._last = False

    def watch(self, looks: Sequence[Look]) -> None:
        """Needs a reducer that keeps lanes apart. Independent."""
        self.reducer.watch(looks)

    def discard(self) -> None:
        """Independent."""
        self.reducer.discard()

    def step(self, lr: float, tokens: int) -> StepStats:
        """Sum, scale to the mean over `tokens` target tokens, clip, update. A gradient that is not finite in any lane
        skips the update on every rank alike, because every rank sees the same sum. Collective over compute_comm."""
        self.reducer.finish()
        if tokens == 0:  # every target is masked
            return StepStats(grad_norm=0.0, skipped=True)
        scale = self.nominal_tokens / tokens
        norm = self.reducer.norm() * scale
        if not math.isfinite(norm):
            return StepStats(grad_norm=norm, skipped=True)
        if self.clip and norm > self.clip:
            scale *= self.clip / norm
        self.reducer.scale(scale)
        if self.optimizer is not None:
            self.optimizer.step(lr)
        self.reducer.publish(self.parameters)
        return StepStats(grad_norm=norm, skipped=False)

    def flats(self) -> dict[str, Tensor]:
        """All that replicas must agree on, by the suffix that tells it apart. Independent."""
        return {"": self.flat} | (self.optimizer.moments() if self.optimizer is not None else {})

    def finish(self) -> None:
        """Nothing is in flight between steps. Independent."""

    def state_dict(self) -> dict[str, Entry]:
        """Optimizer state; under `root` rank 0 alone holds it. Independent."""
        if self.optimizer is None:
            return {}
        layout: Layout = "replicated" if self.reducer.everyone_updates else "sharded"
        return {name: Entry(tensor, layout) for name, tensor in self.optimizer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Independent."""
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state)

    def close(self) -> None:
        """Give shared memory back; parameters, gradients and state are gone with it. Collective over compute_comm."""
        if self.reducer.worker is not None:
            self.reducer.worker.close()
        self.group.fence()
        if self.group.node.size > 1:
            for p in self.parameters:
                p.grad, p.data = None, torch.empty(0)
        self.group.close()

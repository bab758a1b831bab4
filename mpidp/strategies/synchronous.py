"""Exact synchronous data parallelism: all lanes of a step are averaged, everybody (or the root) updates, all are equal.

theta <- update(theta, (sum over lanes of the gradients of token losses) / (number of tokens)): the mean over tokens of
the global batch, never a mean of means. docs/equations.md has the formula and its law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.buckets import GradientBuffer
from mpidp.comm.reducers import Reducer
from mpidp.optim import Optimizer
from mpidp.state import Entry, Layout
from mpidp.strategies.protocol import StepStats


class Synchronous:
    """Every step waits for all lanes."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        optimizer: Optimizer,
        reducer: Reducer,
        global_norm: Callable[[Tensor], Tensor],
        clip: float,
        nominal_tokens: int,
        bucket_bytes: int,
    ) -> None:
        """clip: largest gradient norm, 0 for no clipping; nominal_tokens: global_batch x seq_len, by which losses were
        divided. Collective over comm."""
        self.compute_comm = comm
        self.parameters = [p for _, p in named_parameters]
        self.optimizer, self.reducer = optimizer, reducer
        self.global_norm, self.clip, self.nominal_tokens = global_norm, clip, nominal_tokens
        self.buffer = GradientBuffer(named_parameters, reducer.num_slots, bucket_bytes)
        reducer.attach(self.buffer)
        self._last = False
        self.buffer.on_full(lambda: self._last, reducer.begin)

    def start(self) -> None:
        """Make all replicas equal to rank 0's. Collective over compute_comm."""
        for p in self.parameters:
            wire = p.detach().cpu().view(-1).contiguous()
            self.compute_comm.Bcast(wire.numpy(), root=0)
            p.data.copy_(wire.view_as(p))

    @contextmanager
    def micro_batch(self, v: int, last: bool) -> Iterator[None]:
        """Backward of micro-batch v runs inside. Independent."""
        self._last = last
        self.reducer.open(v)
        yield
        self.reducer.close(v)
        self._last = False

    def step(self, lr: float, tokens: int) -> StepStats:
        """Sum, scale to the mean over `tokens` target tokens, clip, update. A gradient that is not finite in any lane
        skips the update on every rank alike, because every rank sees the same sum. Collective over compute_comm."""
        self.reducer.finish()
        if tokens == 0:  # every target is masked
            return StepStats(grad_norm=0.0, skipped=True)
        flat = self.buffer.flat[0]
        scale = self.nominal_tokens / tokens
        norm_tensor = self.global_norm(flat).cpu().view(1)
        self.reducer.publish([norm_tensor])
        norm = float(norm_tensor) * scale
        if not math.isfinite(norm):
            return StepStats(grad_norm=norm, skipped=True)
        if self.clip and norm > self.clip:
            scale *= self.clip / norm
        if self.reducer.holds_sum:
            if scale != 1.0:
                flat.mul_(scale)
            self.optimizer.step(lr)
        self.reducer.publish(self.parameters)
        return StepStats(grad_norm=norm, skipped=False)

    def finish(self) -> None:
        """Nothing is in flight between steps. Independent."""

    def state_dict(self) -> dict[str, Entry]:
        """Optimizer state; under `root` rank 0 alone holds it. Independent."""
        if not self.reducer.holds_sum:
            return {}
        layout: Layout = "replicated" if self.reducer.everyone_updates else "sharded"
        return {name: Entry(tensor, layout) for name, tensor in self.optimizer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Independent."""
        if self.reducer.holds_sum:
            self.optimizer.load_state_dict(state)

"""Compressed sums with error feedback (Seide 2014; Karimireddy 2019), for every method of comm.compress. Rank i has the gradient
g_i and the residual r_i:

    x_i = g_i + r_i;  total = compressed sum of all x_i;  r_i <- compression error on rank i

The new residual r_i contains the error of encoding x_i. In the slice that rank i adds (exchange.py), r_i also contains the
error of encoding the sum. Therefore this equation holds after every round, up to float32 rounding: (sum over rounds of total)
+ (sum over ranks of r_i) = (sum over rounds and ranks of g_i).

A round sums every bucket once. end_round() can undo the round, so a skipped step does not change the residuals. If a value of
a bucket is not finite on any rank, the bucket's sum is nan on all ranks, and the bucket's residuals do not change.

With momentum m (Deep Gradient Compression, Lin 2018, sections 3.1 and 3.2), the velocity u_i <- m u_i + g_i takes the place of
g_i. After the sum, u_i is reset to 0 at the places whose values were sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mpidp.checkpoint.entry import Entry
from mpidp.comm.group import Group
from mpidp.comm.slices import ALIGN
from mpidp.comm.transport import Messages
from mpidp.data.lanes import Lanes
from mpidp.reducers.base import FlatReducer, LaneShares, Reducer
from mpidp.reducers.buckets import Bucket, GradientBuffer
from mpidp.reducers.compression.codes import CODES
from mpidp.reducers.compression.exchange import CompressionMethod, Exchange, all_finite
from mpidp.reducers.compression.powersgd import PowerSGD
from mpidp.reducers.compression.topk import RandomKMethod, TopKMethod


def method_of(name: str, ratio: float, warmup: int, rank: int, seed: int) -> CompressionMethod:
    """Return the compression method for comm.compress=`name`. ratio: comm.ratio. warmup: comm.ratio_warmup, in rounds. rank:
    comm.rank. seed: the seed of powersgd. Pure."""
    if name == "powersgd":
        return PowerSGD(rank, seed)
    if name in ("topk", "randomk"):
        return (TopKMethod if name == "topk" else RandomKMethod)(ratio, warmup)
    return CompressionMethod(CODES[name])


def trimmed(bucket: Bucket) -> Bucket:
    """Return the bucket without the padding after its last parameter. The padding need not be sent. Pure."""
    end = bucket.offsets[-1] + bucket.shapes[-1].numel()
    return replace(bucket, stop=min(bucket.stop, -(-end // ALIGN) * ALIGN))


def padding_of(bucket: Bucket) -> Tensor:
    """Return the int64 indices of the elements of the bucket that belong to no parameter. Index 0 is the bucket's first element.
    Pure."""
    ends = [offset + shape.numel() for offset, shape in zip(bucket.offsets, bucket.shapes, strict=True)]
    nexts = [*bucket.offsets[1:], bucket.stop]
    return torch.cat([torch.arange(end, then) for end, then in zip(ends, nexts, strict=True)]) - bucket.start


class Compressed(FlatReducer):
    """Sums compressed gradients. Each rank adds its compression error to the gradient of the next round (error feedback)."""

    def __init__(
        self, group: Group, lanes: Lanes, transport: Messages, shares: LaneShares, num_slots: int, method: CompressionMethod,
        seed: int, momentum: float = 0.0, **more: Any,
    ) -> None:
        """seed: the seed of all random numbers of the method. Independent."""
        super().__init__(group, lanes, transport, shares, num_slots, **more)
        self.method, self.momentum = method, momentum
        self.exchange = Exchange(self.comm, transport, lambda request: self.wait(request), seed)
        self.rounds = 0  # number of applied rounds
        self._round: dict[int, Bucket] = {}  # buckets summed in the current round
        self._padding: dict[int, Tensor] = {}

    def attach(self, buffer: GradientBuffer) -> None:
        super().attach(buffer)
        names = ("residual", "velocity") if self.momentum else ("residual",)
        self.held, self._before = ({name: torch.zeros_like(buffer.flat[0]) for name in names} for _ in range(2))

    def bytes_sent(self, bucket: Bucket) -> int:
        """Return the number of bytes that this rank sends for the next sum of the bucket. Independent."""
        return self.method.bytes_sent(trimmed(bucket), self.rounds, self.comm.rank, self.comm.size)

    def sum(self, flat: Tensor, bucket: Bucket) -> None:
        bucket = trimmed(bucket)
        if bucket.index in self._round:  # a new round begins; the previous round was not undone
            self.end_round(True)
        self._round[bucket.index] = bucket
        place = slice(bucket.start, bucket.stop)
        held = {name: tensor[place] for name, tensor in self.held.items()}
        for name, tensor in held.items():
            self._before[name][place] = tensor
        x = flat[place] + held["residual"]
        if self.momentum:
            x += held["velocity"] * self.momentum
        found = self.method.sum(x, bucket, self.rounds, self.exchange)
        if not (found.finite and all_finite(found.total)):  # the same on all ranks
            flat[place] = math.nan
            return
        if self.momentum:
            velocity = held["velocity"].mul_(self.momentum).add_(flat[place])
            velocity[found.unsent != x] = 0.0
        flat[place] = found.total
        held["residual"].copy_(found.unsent)
        held["residual"][found.own] += found.late
        if not self.method.keeps_zeros:
            for tensor in (flat[place], held["residual"]):
                tensor.index_fill_(0, self._padding_of(bucket), 0.0)

    def _padding_of(self, bucket: Bucket) -> Tensor:
        if bucket.index not in self._padding:
            self._padding[bucket.index] = padding_of(bucket).to(self.buffer.flat.device)
        return self._padding[bucket.index]

    def end_round(self, applied: bool) -> None:
        if not applied:
            for bucket in self._round.values():
                for name, tensor in self.held.items():
                    tensor[bucket.start : bucket.stop] = self._before[name][bucket.start : bucket.stop]
        self.method.end_round(applied)
        self.rounds += bool(self._round) and applied
        self._round.clear()

    def state_dict(self) -> dict[str, Entry]:
        """Return copies of the state. Later rounds do not change the copies. A round that has not ended counts as applied.
        Independent."""
        found = {name: Entry(tensor.clone(), "additive") for name, tensor in self.held.items()}
        found["rounds"] = Entry(torch.tensor([self.rounds + bool(self._round)]))
        return found | {f"method/{name}": Entry(tensor) for name, tensor in self.method.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._round.clear()
        self.rounds = int(state["rounds"]) if state else 0
        for name, tensor in self.held.items():
            if name in state:
                tensor.copy_(state[name])
            else:
                tensor.zero_()
        mine = {name.removeprefix("method/"): value for name, value in state.items() if name.startswith("method/")}
        self.method.end_round(False)
        self.method.load_state_dict(mine)

    def resume_from(self, before: Reducer | None) -> None:
        """Take over the state of `before` (see Reducer). The residuals of failed ranks are lost. Collective over all ranks."""
        state: dict[str, Tensor] = {}
        if before is not None:
            before.end_round(False)  # undo the failed step
            state = {name: entry.tensor for name, entry in before.state_dict().items()}
        common = self.comm.bcast({name: tensor.cpu().numpy() for name, tensor in state.items() if name not in self.held})
        own = {name: tensor for name, tensor in state.items() if name in self.held}
        self.load_state_dict({name: torch.from_numpy(array) for name, array in common.items()} | own)

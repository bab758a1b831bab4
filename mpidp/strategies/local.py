"""Ranks train independently and average periodically: local SGD, DiLoCo, partial aggregation and gossip.

A rank updates its own parameters with the gradients of its own micro-batches (inner steps). Every `sync_every` steps the ranks
average their models:

- With group=all, every rank stores the parameters after the last average. They are called the anchor, and are the same on all
  ranks. The outer gradient of rank r is anchor - theta_r, where theta_r are the parameters of the rank. The mean of the outer
  gradients is weighted by target tokens. With this mean, SGD with Nesterov momentum makes an outer step from the anchor
  (Douillard 2023, DiLoCo, algorithm 1). outer_lr=1 with outer_momentum=0 is local SGD (Stich 2019), which averages parameters.
  With `fragments`, the model is divided into fragments, which are averaged at different steps (Douillard 2025, Streaming DiLoCo,
  section 2.2). With `overlap`, an average is applied when the next average is started (Kale 2025).
- With any other value of `group`, the ranks average their parameters within smaller groups. The groups can differ from one
  average to the next (averaging_groups.py).

At a meeting (a step at which all ranks synchronize), all ranks average the whole model without delay. Afterwards all ranks
have the same model. With group=all, the anchor and the outer momentum take 8 bytes of memory per parameter. With `overlap`, a
rank needs 8 more bytes per parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.checkpoint.entry import Entry
from mpidp.comm.background import Background, Task
from mpidp.comm.buffers import buf
from mpidp.comm.peers import Peers
from mpidp.errors import MpidpError, UsageError
from mpidp.reducers.base import FlatReducer
from mpidp.reducers.buckets import Bucket
from mpidp.reducers.overlap import OVERLAP_WAITS
from mpidp.runtime.log import counted
from mpidp.strategies.averaging_groups import hop, partition
from mpidp.strategies.protocol import StepStats, StrategyOptions
from mpidp.strategies.synchronous import Synchronous

SUM, OWN = 1, 2  # slots of the gradient buffer for an average in flight: the sum, and this rank's contribution


class Local(Synchronous):
    """Updates each rank's parameters independently, and averages them periodically. During a step, slot 0 of the gradient
    buffer (its first flat gradient) holds the gradient. After the step, an average without `overlap` uses the same slot."""

    survives_failures = False
    synchronizes_always = False

    def __init__(self, *parts: Any, **more: Any) -> None:
        """Take the arguments of Synchronous. The reducer must be a FlatReducer. Raises UsageError if there are more fragments
        than buckets. Collective over comm."""
        super().__init__(*parts, **more)
        options = self.options
        assert isinstance(self.reducer, FlatReducer)
        self._flat_reducer, self._peers = self.reducer, Peers(self.reducer.comm, self.reducer.transport)
        self._outer = options.group == "all"
        buckets = self.buffer.buckets
        if options.fragments > len(buckets):
            raise UsageError.on_every_rank(
                f"strategy.fragments={options.fragments}, but the parameters fill only {counted(len(buckets), 'bucket')}. Lower "
                "strategy.fragments, or lower comm.bucket_mb to get more buckets"
            )
        self._fragments = [buckets[i :: options.fragments] for i in range(options.fragments)]
        self._tokens = torch.zeros(options.fragments, dtype=torch.float64)  # target tokens since each fragment's last average
        self._in_flight: list[Task | None] = [None] * options.fragments  # the running average of each fragment
        self._background = Background()
        if options.overlap:
            self._flat_reducer.set_wait(OVERLAP_WAITS["poll"])
        self._steps = 0
        self._anchor = self.flat.clone() if self._outer else torch.empty(0)
        self._momentum = torch.zeros_like(self._anchor)

    def more_slots(self, options: StrategyOptions) -> int:
        """Return 2 with `overlap` (one gradient buffer for the sum, and one for this rank's contribution), else 0.
        Independent."""
        return 2 * options.overlap

    def start(self) -> None:
        """Set the parameters and the anchors (the parameters after the last average) of all ranks to rank 0's parameters.
        Collective over compute_comm."""
        super().start()
        if self._outer:
            self._anchor.copy_(self.flat)

    def step(self, lr: float, tokens: int, limit: float = math.inf) -> StepStats:
        """Make an inner step, and the averages that are due. A rank makes no update if it has no target tokens, or if its
        gradient is not finite or exceeds `limit`. The step is counted nevertheless. `tokens`: number of target tokens in this
        rank's micro-batches. Collective over compute_comm if an average is due, else independent."""
        stats = self._inner(lr, tokens, limit)
        self._steps += 1
        self.reducer.observers.enter("reduce")
        synchronizes, every = self.synchronizes_at(self._steps), self.options.sync_every
        if self._outer:
            for i, buckets in enumerate(self._fragments):
                if synchronizes or (self._steps + i * every // len(self._fragments)) % every == 0:
                    self._average(i, buckets, at_once=synchronizes or not self.options.overlap)
        elif synchronizes:
            self._average_all()
        elif self._steps % every == 0:
            self._average_group(self._steps // every)
        return stats

    def _inner(self, lr: float, tokens: int, limit: float) -> StepStats:
        gradient, scale = self.buffer.flat[0], self.nominal_tokens / max(1, tokens)
        norm = self.reducer.norm_of(gradient) * scale if tokens else 0.0
        if tokens and math.isfinite(norm) and norm <= limit:
            gradient.mul_(scale * (self.clip / norm if self.clip and norm > self.clip else 1.0))
            assert self.optimizer is not None
            self.optimizer.step(lr)
            self._tokens += tokens
        self.reducer.discard()
        return StepStats(grad_norm=norm, skipped=False)

    def _average(self, i: int, buckets: Sequence[Bucket], at_once: bool) -> None:
        """If an average of fragment i was started earlier and has not been applied, apply it. Then start a new average. If
        `at_once` is true, wait for the new average and apply it, too."""
        if (task := self._in_flight[i]) is not None:
            with self.reducer.transport.timed():
                task.wait()
            self._in_flight[i] = None
            for part in map(_slice, buckets):
                self._outer_step(part, self.buffer.flat[SUM, part], self.buffer.flat[OWN, part])
        weight = self._weight(i)
        target = self.buffer.flat[0 if at_once else SUM]
        for part in map(_slice, buckets):
            torch.sub(self._anchor[part], self.flat[part], out=target[part])
            if not at_once:
                self.buffer.flat[OWN, part] = target[part]
            target[part].mul_(weight)
        task = self._background.submit(partial(self._sum, target, buckets))  # the thread first finishes the sums in flight
        if not at_once:
            self._in_flight[i] = task
            return
        with self.reducer.transport.timed():
            task.wait()
        for part in map(_slice, buckets):
            self._outer_step(part, target[part], None)

    def _weight(self, i: int) -> float:
        """Return this rank's weight in the average of fragment i. The weight is the rank's fraction of the target tokens in all
        updates since the last average. Raises MpidpError if no rank has made an update. Collective over compute_comm."""
        total = self._tokens[i : i + 1].clone()
        with self.reducer.transport.timed():
            self.group.wait(self.compute_comm.Iallreduce(MPI.IN_PLACE, buf(total)))
        mine, self._tokens[i] = float(self._tokens[i]), 0.0
        if not total:
            raise MpidpError.on_every_rank(
                f"step {self._steps}: no rank has made an update for strategy.sync_every={self.options.sync_every} steps, "
                "because gradients were not finite or batches had no target tokens. Lower optim.lr, or check the data of these "
                "steps. The last checkpoint is kept"
            )
        return mine / float(total)

    def _sum(self, flat: Tensor, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            self._flat_reducer.sum_observed(flat, bucket)
        self._flat_reducer.end_round(applied=True)

    def _outer_step(self, part: slice, mean: Tensor, own: Tensor | None) -> None:
        """Update the anchor with `mean`, the averaged outer gradient. If `own` is None, the average was started in this step,
        and the parameters are set to the new anchor. Otherwise, `own` is this rank's outer gradient at the earlier step in
        which the average was started. The parameters are then set to the new anchor plus the inner steps that this rank has
        made since that step."""
        anchor, momentum, mu = self._anchor[part], self._momentum[part], self.options.outer_momentum
        momentum.mul_(mu).add_(mean)
        moved = (mean + mu * momentum).mul_(-self.options.outer_lr)
        if own is not None:
            self.flat[part] += moved + own
        anchor += moved
        if own is None:
            self.flat[part] = anchor

    def _average_all(self) -> None:
        """Average the parameters over all ranks with equal weights. Collective over compute_comm."""
        target = self.buffer.flat[0]
        torch.div(self.flat, self.compute_comm.size, out=target)
        with self.reducer.transport.timed():
            self._sum(target, self.buffer.buckets)
        self.flat.copy_(target)

    def _average_group(self, t: int) -> None:
        """Average the parameters within this rank's group. `t`: number of the average. Collective over the group."""
        size, options = self.compute_comm.size, self.options
        with self.reducer.transport.timed():
            if options.group == "exponential":
                self._peers.gossip(self.flat, hop(t, size), self.buffer.flat[0])
                return
            groups = partition(options.group, t, size, options.nodes, options.group_size)
            mine = next(group for group in groups if self.compute_comm.rank in group)
            self._peers.average(self.flat, mine, self.buffer.flat[0])

    def state_dict(self) -> dict[str, Entry]:
        """Return the state. Call this method at a meeting (a step at which all ranks synchronize), when no average is in
        progress. The state contains each rank's own inner optimizer state. It does not contain the anchor, which equals the
        parameters at a meeting. Independent."""
        size, rank = self.compute_comm.size, self.compute_comm.rank
        assert self.optimizer is not None
        found = {"steps": Entry(torch.tensor(self._steps))}
        found |= {f"reducer/{name}": entry for name, entry in self._flat_reducer.state_dict().items()}
        for name, flat in self.optimizer.moments().items():
            found[f"inner{name}"] = Entry(flat.view(1, -1), "sharded", (rank, 0), (size, flat.numel()))
        found["inner/updates"] = Entry(torch.tensor([self.optimizer.updates]), "sharded", (rank,), (size,))
        return found | ({"outer/momentum": Entry(self._momentum)} if self._outer else {})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state. If P ranks saved the state, rank r takes the inner optimizer state of rank r mod P. Independent."""
        assert self.optimizer is not None
        self._steps = int(state["steps"])
        row = self.compute_comm.rank % len(state["inner/updates"])
        for name, flat in self.optimizer.moments().items():
            flat.copy_(state[f"inner{name}"][row])
        self.optimizer.set_updates(int(state["inner/updates"][row]))
        held = {name.removeprefix("reducer/"): value for name, value in state.items() if name.startswith("reducer/")}
        self._flat_reducer.load_state_dict(held)
        if self._outer:
            self._anchor.copy_(self.flat)
            self._momentum.copy_(state["outer/momentum"])

    def close(self) -> None:
        """Stop the thread, and free the communicators and the memory. Collective over compute_comm."""
        self._background.close()
        self._peers.close()
        super().close()


def _slice(bucket: Bucket) -> slice:
    return slice(bucket.start, bucket.stop)

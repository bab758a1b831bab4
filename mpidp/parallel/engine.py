"""Runs the forward and backward passes of a schedule, and evaluations. The optimizer is not part of the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.slices import sum_in_order
from mpidp.data.loader import Batch, MicroBatch
from mpidp.data.shards import TokenStream
from mpidp.errors import DataError
from mpidp.parallel.evaluation import num_pairs, windows_of
from mpidp.parallel.pipeline import BACKWARD, FORWARD, Stages
from mpidp.parallel.schedule import Forward, Instruction
from mpidp.runtime.observers import NO_OBSERVERS, StepObservers

Fill = Callable[[int, int | None], None]  # (number of forward passes, chunk): Strategy.fill
Tie = Callable[[int], AbstractContextManager[Any]]  # (micro-batch)


def dropout_key(seed: int, batch: int, v: int) -> int:
    """Return the 32-bit dropout key of micro-batch `v` of global batch `batch`. The key, and therefore the dropout, is the same
    on every rank. Pure."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{batch}/{v}".encode(), digest_size=4).digest(), "little")


@dataclass
class PendingBackward:
    """A micro-batch between its forward and backward pass."""

    mb: MicroBatch
    received: Tensor | None  # hidden states from the previous stage; None on the first stage
    output: Tensor | None  # the sum of losses, or hidden states for the next stage; None if the micro-batch is empty
    chunk: int = 0  # index of the chunk (group of consecutive layers) of the stage


@dataclass
class Computed:
    """The results of one rank for its micro-batches of a global batch."""

    micro_batches: list[int]
    losses: list[float]  # sum of token losses in nats, per micro-batch
    num_tokens: list[int]  # number of target tokens per micro-batch
    lane_squares: dict[int, float] = field(default_factory=dict)  # {lane (sequence of micro-batches): squared gradient norm}


class Engine:
    """Runs a model on a device, with matrix products in a given precision. Methods are independent unless their docstrings say
    otherwise. With mesh.tp or mesh.shard=2|3, forward and backward passes are collective over the ranks that compute together."""

    def __init__(
        self, model: Any, device: torch.device, dtype: torch.dtype, seed: int, dropout: float, nominal_tokens: int,
        stages: Stages | None = None, token_losses: Callable[[Tensor, Tensor], Tensor] | None = None, reports_loss: bool = True,
        observers: StepObservers = NO_OBSERVERS, fill: Fill = lambda forwards, chunk: None, tie: Tie = nullcontext,
    ) -> None:
        """dtype: dtype of matrix products under autocast. The weights stay float32. nominal_tokens: every loss is divided by
        this number before backward, so that gradients do not overflow 16-bit formats. stages: this rank's pipeline stage, or
        None without a pipeline. token_losses: a function (logits, targets) that returns the sum of the token losses. By
        default, it is plain_losses(). reports_loss: False if another rank reports the same losses. observers: notified of
        every micro-batch and phase. fill: Strategy.fill. The engine calls it while other ranks compute forward passes and
        this rank has no micro-batch, because their communication may need this rank. tie: a function that takes the number of a
        micro-batch, and returns the context manager in which the backward pass of this micro-batch runs (tied.py)."""
        self.model, self.device, self.dtype = model, device, dtype
        self.seed, self.dropout, self.nominal_tokens = seed, dropout, nominal_tokens
        self.stages, self.token_losses, self.reports_loss = stages, token_losses or plain_losses, reports_loss
        self.observers, self.fill, self.tie = observers, fill, tie

    def peak_bytes(self) -> int | None:
        """Return the largest number of bytes that torch has had allocated on this CUDA device. Return None on the CPU.
        Independent."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def hidden(self, mb: MicroBatch, key: Tensor | None, received: Tensor | None = None, chunk: int = 0) -> Tensor:
        """Run chunk `chunk` (a group of consecutive layers) of this rank's part of the model. The input is `received`, the
        hidden states from the previous stage. If `received` is None, the input is the tokens of `mb`. key: the dropout key, or
        None for no dropout. Return hidden states, or logits if this is the model's last chunk."""
        with self._autocast():
            x = mb.tokens if received is None else received
            place = () if self.stages is None else (mb.tokens.shape[1], chunk)
            return self.model(x, mb.positions, mb.doc_ids, key, *place)  # type: ignore[no-any-return]

    def loss_sum(self, mb: MicroBatch, key: Tensor | None, received: Tensor | None = None, chunk: int = 0) -> Tensor:
        """Return the sum of the token losses of `mb` in nats, as a float32 scalar on the device. Call this only for the last
        chunk of the model. The arguments are those of hidden()."""
        return self.token_losses(self.hidden(mb, key, received, chunk).float().flatten(0, 1), mb.targets.flatten())

    def run(self, schedule: Iterable[Instruction], batch: Batch, strategy: GradientSink) -> Computed:
        """Run the passes of `schedule` on micro-batches of the global batch `batch`. Return the losses. strategy: provides the
        memory in which gradients accumulate. With mesh.tp or mesh.pp, collective over the ranks of a replica. With mesh.shard=2
        or 3, collective over all ranks. Otherwise independent."""
        self.model.train()
        done, losses, num_tokens = [], [], []
        loss_of: dict[int, Tensor] = {}
        waiting: dict[tuple[int, int], PendingBackward] = {}
        for instruction in schedule:
            with self.observers.span("micro_batch"):
                v, chunk = instruction.v, instruction.chunk
                if isinstance(instruction, Forward):
                    with self.observers.span("forward"):
                        waiting[v, chunk] = self._forward(batch[v], batch.batch, chunk)
                    continue
                pending = waiting.pop((v, chunk))
                with strategy.micro_batch(v, instruction.last, chunk), self.tie(v), self.observers.span("backward"):
                    loss = self._backward(pending)
            self.observers.progressed()
            if chunk:
                loss_of.setdefault(v, loss)  # only the last chunk has a loss, and the backward pass of the last chunk comes first
                continue
            losses.append(loss_of.pop(v, loss))
            done.append(v)
            num_tokens.append(pending.mb.num_tokens)
        sums = torch.stack(losses).tolist() if losses else []
        return Computed(done, sums if self.stages is None else self.stages.drain(sums), num_tokens)

    def _forward(self, mb: MicroBatch, batch: int, chunk: int) -> PendingBackward:
        if mb.tokens.shape[0] == 0:  # at the end of an epoch, micro-batches can be empty
            self.fill(1, chunk)
            return PendingBackward(mb, None, None, chunk)
        key = None
        if self.dropout:
            key = torch.tensor(dropout_key(self.seed, batch, mb.v), device=self.device)
        return self._forward_stage(mb, key, chunk)

    def _forward_stage(self, mb: MicroBatch, key: Tensor | None, chunk: int = 0) -> PendingBackward:
        """Receive hidden states from the previous stage, run chunk `chunk` on them, and send the result to the next stage. The
        model's first chunk starts from tokens, and the model's last chunk computes the loss."""
        received = None
        if self.stages is not None and not self.stages.is_first(chunk):
            b, t = mb.tokens.shape
            size = (b, len(self.model.part.positions(t)), self.model.shape.model_dim)
            received = self.stages.receive(FORWARD, mb.v, size, chunk).requires_grad_()
        if self.stages is None or self.stages.is_last(chunk):
            rest = () if received is None else (received, chunk)
            return PendingBackward(mb, received, self.loss_sum(mb, key, *rest), chunk)
        output = self.hidden(mb, key, received, chunk)
        self.stages.send(FORWARD, mb.v, output, chunk)
        return PendingBackward(mb, received, output, chunk)

    def _backward(self, pending: PendingBackward) -> Tensor:
        """Run the backward pass of a micro-batch. Return the sum of its token losses as a tensor on the device, without
        waiting for the device. Return 0 on stages that do not compute the loss."""
        nothing = torch.zeros((), device=self.device)
        if pending.output is None:
            return nothing
        ends = self.stages is None or self.stages.is_last(pending.chunk)
        if self.stages is None or ends:
            (pending.output / self.nominal_tokens).backward()
        else:
            grad = self.stages.receive(BACKWARD, pending.mb.v, tuple(pending.output.shape), pending.chunk)
            if pending.output.requires_grad:  # otherwise all parameters before this output are frozen
                pending.output.backward(grad)
        if pending.received is not None and self.stages is not None:
            assert pending.received.grad is not None
            self.stages.send(BACKWARD, pending.mb.v, pending.received.grad, pending.chunk)
        return pending.output.detach() if ends else nothing

    @torch.no_grad()
    def evaluate(
        self, stream: TokenStream, comm: MPI.Intracomm, seq_len: int, sequences: int, max_tokens: int = 0,
        replicas: MPI.Intracomm | None = None,
    ) -> tuple[float, int]:
        """Return (mean loss in nats per target, number of targets). Every token of `stream` except the first is a target once,
        unless the loss mask excludes it.

        seq_len: number of inputs per window. Windows are computed independently, and the last window may be shorter.
        max_tokens: if above 0, evaluate only the first max_tokens // seq_len windows, but at least one. sequences: number of
        windows per batch. The losses of batches are added in order, so the bits do not depend on the number of ranks.
        replicas: the communicator over whose ranks the batches are distributed (default: `comm`). If several ranks compute a
        batch together, this communicator has one rank of each replica. Raises DataError if a token id is outside the
        vocabulary, or if the loss mask excludes all targets. Collective over comm.
        """
        self.model.eval()
        targets = stream.num_tokens - 1
        if max_tokens:
            targets = min(targets, max(seq_len, max_tokens // seq_len * seq_len))
        span = seq_len * sequences
        starts = list(range(0, targets, span))
        sums = np.zeros(len(starts))
        counts = np.zeros(len(starts), dtype=np.int64)
        among = replicas or comm
        for i in range(among.rank, len(starts), among.size):
            self.observers.enter("evaluate")
            length = min(span, targets - starts[i])
            read = stream.read(starts[i], length + 1)
            stream.check_ids(starts[i], read)
            mask = stream.read_mask(starts[i], length + 1)
            begins = stream.read_starts(starts[i], length + 1) if stream.apart else None
            tokens = read.astype(np.int64)
            for places in windows_of(length, seq_len):
                counted, begun = (None if one is None else one[places] for one in (mask, begins))
                mb = MicroBatch.of(i % 1000, tokens[places], counted, begun).to(self.device)
                found = [self._forward_stage(mb, None, chunk) for chunk in range(self.stages.chunks if self.stages else 1)][-1]
                if self.reports_loss and found.output is not None:
                    sums[i] += float(found.output)
                    counts[i] += mb.num_tokens
        if self.stages is not None:
            self.stages.drain([])
        forwards = [num_pairs(min(span, targets - at), seq_len) for at in starts]
        of_ranks = [sum(forwards[rank :: among.size]) for rank in range(among.size)]
        self.fill(max(of_ranks) - of_ranks[among.rank], None)
        self.observers.enter("evaluate_wait")
        comm.Allreduce(MPI.IN_PLACE, sums)  # no rounding, because each entry is nonzero on one rank only
        comm.Allreduce(MPI.IN_PLACE, counts)
        self.model.train()
        counted = int(counts.sum())
        if counted == 0:
            raise DataError.on_every_rank(
                f"{stream.path}: the loss mask excludes all of the first {targets:,} targets of split {stream.split!r}, so "
                "there is no loss to compute. Evaluate on more tokens (raise train.eval_tokens), or prepare the data again "
                "with a loss mask that keeps some of these targets"
            )
        return sum_in_order(sums.tolist()) / counted, counted


def plain_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the cross entropies in nats. logits: (N, V). targets: (N,). Targets of -100 are ignored. Pure."""
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


class GradientSink(Protocol):
    """The part of a strategy that the engine uses. It provides the memory in which gradients accumulate."""

    def micro_batch(self, v: int, last: bool, chunk: int = 0) -> AbstractContextManager[None]:
        """Return a context manager. The backward pass of micro-batch `v` through chunk `chunk` must run inside it. last: whether
        `v` is the rank's last micro-batch of this step. Independent."""

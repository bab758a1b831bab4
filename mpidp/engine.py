"""Runs a schedule: forward and backward of micro-batches. It fills gradients and owns no optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import Tensor

from mpidp.data.loader import Batch, MicroBatch
from mpidp.data.shards import TokenStream
from mpidp.errors import DataError
from mpidp.parts import at_rest, whole
from mpidp.schedule import Instruction
from mpidp.strategies.protocol import Accumulates


def dropout_key(seed: int, batch: int, v: int) -> int:
    """A 32-bit key of (seed, batch, micro-batch): randomness belongs to the data, not to a rank. Pure."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{batch}/{v}".encode(), digest_size=4).digest(), "little")


@dataclass
class Computed:
    """What a rank computed of a global batch."""

    micro_batches: list[int]
    losses: list[float]  # sums of token losses, nats
    num_tokens: list[int]  # target tokens
    lane_squares: dict[int, float] = field(default_factory=dict)  # squared norms of lanes' gradients, where measured


class Engine:
    """A model on a device with a precision. Independent, except where a method says otherwise."""

    def __init__(
        self, model: torch.nn.Module, device: torch.device, dtype: torch.dtype, seed: int, dropout: float, nominal_tokens: int
    ) -> None:
        """dtype: of matrix products under autocast (master weights stay float32); nominal_tokens: what every loss is divided
        by before backward, so that sums over the whole batch stay of the size of a mean (16-bit wires)."""
        self.model, self.device, self.dtype = model, device, dtype
        self.seed, self.dropout, self.nominal_tokens = seed, dropout, nominal_tokens
        self.slowed: Callable[[], AbstractContextManager[Any]] = nullcontext  # around each micro-batch, for tests of slow ranks
        self.beat: Callable[[], None] = lambda: None  # after each: the watchdog sees that this rank gets further
        self.fill: Callable[[int], None] = lambda forwards: None  # so many more, where all ranks must make as many as any does

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def loss_sum(self, mb: MicroBatch, key: Tensor | None) -> Tensor:
        """Sum of token losses of a micro-batch in nats, float32 scalar on the device."""
        with self._autocast():
            logits = self.model(mb.tokens, mb.positions, mb.doc_ids, key)
        return F.cross_entropy(logits.float().flatten(0, 1), mb.targets.flatten(), ignore_index=-100, reduction="sum")

    def run(self, schedule: Iterable[Instruction], batch: Batch, strategy: Accumulates) -> Computed:
        """Walk the schedule over micro-batches of a global batch."""
        self.model.train()
        done, losses, num_tokens = [], [], []
        for instruction in schedule:
            with self.slowed(), strategy.micro_batch(instruction.v, instruction.last):
                mb = batch[instruction.v]
                losses.append(self._learn(mb, batch.batch))
            self.beat()
            done.append(mb.v)
            num_tokens.append(mb.num_tokens)
        return Computed(done, torch.stack(losses).tolist() if losses else [], num_tokens)

    def _learn(self, mb: MicroBatch, batch: int) -> Tensor:
        """Forward and backward; the loss sum, on the device and not waited for."""
        if mb.tokens.shape[0] == 0:  # the end of an epoch: this micro-batch has no sequence left
            return torch.zeros((), device=self.device)
        key = None
        if self.dropout:
            key = torch.tensor(dropout_key(self.seed, batch, mb.v), device=self.device)
        loss = self.loss_sum(mb, key)
        (loss / self.nominal_tokens).backward()
        return loss.detach()

    @torch.no_grad()
    def evaluate(
        self, stream: TokenStream, comm: MPI.Intracomm, seq_len: int, sequences: int, max_tokens: int = 0,
        enter: Callable[[str], None] = lambda phase: None,
    ) -> tuple[float, int]:
        """Mean loss in nats a token over the stream, every token (but the first) once as a target, and their number.

        Windows of seq_len do not see each other; the last may be short; max_tokens > 0 stops after that many. Batches of
        `sequences` windows are dealt out over the ranks and added in order: the same bits at any number of ranks. DataError
        for an id beyond the vocabulary, or no target at all. enter: is told what this rank does. Collective over comm.
        """
        self.model.eval()
        targets = stream.num_tokens - 1
        if max_tokens:
            targets = min(targets, max(seq_len, max_tokens // seq_len * seq_len))
        span = seq_len * sequences
        starts = list(range(0, targets, span))
        sums = np.zeros(len(starts))
        counts = np.zeros(len(starts), dtype=np.int64)
        for i in range(comm.rank, len(starts), comm.size):
            enter("evaluate")
            length = min(span, targets - starts[i])
            read = stream.read(starts[i], length + 1)
            stream.check_ids(starts[i], read)
            tokens = torch.from_numpy(read.astype(np.int64))
            mask = stream.read_mask(starts[i], length + 1)
            wanted = tokens[1:] if mask is None else tokens[1:].masked_fill(~torch.from_numpy(mask[1:]), -100)
            for inputs, outputs in _windows(tokens[:-1], wanted, seq_len):
                valid = int((outputs != -100).sum())
                mb = MicroBatch(i, inputs.to(self.device), outputs.to(self.device), valid)
                sums[i] += float(self.loss_sum(mb, None))
                counts[i] += valid
        forwards = [_num_pairs(min(span, targets - at), seq_len) for at in starts]
        of_ranks = [sum(forwards[rank :: comm.size]) for rank in range(comm.size)]
        self.fill(max(of_ranks) - of_ranks[comm.rank])
        enter("evaluate_wait")
        comm.Allreduce(MPI.IN_PLACE, sums)  # each entry has one writer, so this adds zeros
        comm.Allreduce(MPI.IN_PLACE, counts)
        self.model.train()
        counted = int(counts.sum())
        if counted == 0:
            raise DataError.on_every_rank(
                f"{stream.path}: none of the first {targets:,} targets of split {stream.split!r} counts by its loss mask; "
                "evaluate on more of it (train.eval_tokens), or prepare it again"
            )
        return float(sum(sums.tolist())) / counted, counted


def _num_pairs(length: int, seq_len: int) -> int:
    """How many pairs _windows makes of so many inputs."""
    return (length >= seq_len) + (length % seq_len > 0)


def _windows(inputs: Tensor, outputs: Tensor, seq_len: int) -> list[tuple[Tensor, Tensor]]:
    """The full windows as one (n, T) pair, and a short rest as one (1, rest) pair."""
    full = len(inputs) // seq_len * seq_len
    parts = []
    if full:
        parts.append((inputs[:full].view(-1, seq_len), outputs[:full].view(-1, seq_len)))
    if full < len(inputs):
        parts.append((inputs[full:].view(1, -1), outputs[full:].view(1, -1)))
    return parts


def weights_sha256(model: torch.nn.Module) -> str:
    """sha256 over the float32 parameters in name order, little-endian bytes; of shards too, a parameter at a time. Collective
    over the ranks that hold shards, if there are any."""
    at_rest(model)  # numpy's view of a gathered parameter would keep its memory
    digest = hashlib.sha256()
    for _, p in sorted(model.named_parameters()):
        digest.update(whole(p).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

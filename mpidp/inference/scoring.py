"""Computes losses and log-likelihoods of given texts on all replicas. Results do not depend on the number of replicas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.slices import sum_in_order
from mpidp.inference.choices import EncodedChoice
from mpidp.inference.loading import Loaded
from mpidp.parallel.engine import plain_losses
from mpidp.parallel.grid import Grid
from mpidp.runtime.world import polite_barrier

UNSCORED = -100  # target that is ignored by the loss


Figure: TypeAlias = Callable[[Tensor, Tensor], float]  # takes logits (T, V of this rank) float32 and targets (T,)


def row_losses(loaded: Loaded, rows: Sequence[tuple[Sequence[int], int]]) -> list[float]:
    """For each row (ids, n), return the sum of the losses of the last n ids, in nats.

    Rows may have different lengths. All ranks of a replica get the same result. Collective over loaded.grid.model.
    """
    return _figures(loaded, rows, [_loss_of(loaded)])


def row_scores(loaded: Loaded, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
    """For each row (ids, n), return (log-likelihood of the last n ids in nats, whether greedy decoding would generate these
    ids).

    All ranks of a replica get the same result. Collective over loaded.grid.model.
    """
    found = _figures(loaded, rows, [_loss_of(loaded), _greedy_of(loaded)])
    return [(-loss, greedy > 0) for loss, greedy in zip(found[::2], found[1::2], strict=True)]


@torch.no_grad()
def _figures(loaded: Loaded, rows: Sequence[tuple[Sequence[int], int]], figures: Sequence[Figure]) -> list[float]:
    ids = torch.zeros(len(rows), max(len(row) for row, _ in rows), dtype=torch.int64)
    targets = torch.full_like(ids, UNSCORED)
    for i, (row, n) in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
        targets[i, len(row) - n : len(row)] = ids[i, len(row) - n : len(row)]
    logits, found = loaded.forward(ids[:, :-1]), [0.0] * len(rows) * len(figures)
    if logits is not None:
        wanted = targets[:, 1:].to(logits.device)
        found = [of(row.float(), row_targets) for row, row_targets in zip(logits, wanted, strict=True) for of in figures]
    return found if loaded.stages is None else loaded.stages.drain(found)


def _loss_of(loaded: Loaded) -> Figure:
    losses = loaded.losses or plain_losses
    return lambda logits, targets: float(losses(logits, targets))


def _greedy_of(loaded: Loaded) -> Figure:
    """Return a function of a row's logits and targets. It returns 1 if the likeliest token is the target at all scored
    positions, else 0. Calls of this function are collective over loaded.grid.tp."""
    tp, rows = loaded.grid.tp, loaded.model.shape.vocab_size
    first = loaded.model.part.own_range(rows).start

    def greedy(logits: Tensor, targets: Tensor) -> float:
        scored = targets != UNSCORED
        best = logits[scored].max(-1)
        values, tokens = best.values.cpu().numpy(), best.indices.cpu().numpy() + first
        if tp.size > 1:
            own = values.copy()
            tp.Allreduce(MPI.IN_PLACE, values, MPI.MAX)
            tokens[own < values] = rows
            tp.Allreduce(MPI.IN_PLACE, tokens, MPI.MIN)
        return float((tokens == targets[scored].cpu().numpy()).all())

    return greedy


def distribute(grid: Grid, shape: tuple[int, int], work: Callable[[int], Sequence[float]]) -> np.ndarray:
    """Compute n rows of numbers. Each row is computed by one replica. Return all rows on all ranks, (n, width) float64.

    The bits of the result do not depend on the number of replicas. shape: (n, width). work(i): returns row i, which has at most
    `width` numbers. Calls of `work` are collective over grid.model. Collective over grid.world.
    """
    found = np.zeros(shape)
    for i in range(grid.world.rank // grid.parts, shape[0], grid.world.size // grid.parts):
        figures = work(i)
        if grid.model.rank == 0:
            found[i, : len(figures)] = figures
    polite_barrier(grid.world)
    grid.world.Allreduce(MPI.IN_PLACE, found)  # exact: each entry is nonzero on one rank only
    return found


def windows(targets: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """Return sliding windows (begin, scored, end) over `targets` targets. Each target is scored in one window. Pure.

    A window contains the targets [begin, end), and scores the targets [scored, end). It has seq_len targets, or all targets if
    there are fewer. Each window ends `stride` targets after the previous window. The last window may end earlier, at the last
    target.
    """
    found, end = [], 0
    while end < targets:
        scored, end = end, min(targets, end + (stride if end else seq_len))
        found.append((max(0, end - seq_len), scored, end))
    return found


def text_loss(loaded: Loaded, ids: np.ndarray, seq_len: int, stride: int, together: int) -> float:
    """Return the sum of the losses of all ids except the first, in nats, computed in sliding windows.

    Each id has at least seq_len - stride ids of context, or all ids before it if there are fewer. together: number of windows
    per batch. Raises DataError if the sum is not finite. Collective over loaded.grid.world.
    """
    cut = windows(len(ids) - 1, seq_len, stride)
    groups = [cut[i : i + together] for i in range(0, len(cut), together)]

    def work(i: int) -> list[float]:
        return row_losses(loaded, [(ids[begin : end + 1].tolist(), end - scored) for begin, scored, end in groups[i]])

    total = sum_in_order(distribute(loaded.grid, (len(groups), together), work).ravel().tolist())
    if not math.isfinite(total):
        raise loaded.diverged("loss")
    return total


def log_likelihoods(loaded: Loaded, items: Sequence[Sequence[EncodedChoice]]) -> np.ndarray:
    """Return the log-likelihood of each choice in nats, (questions, largest number of choices) float64.

    items: the encoded choices of each question. A choice with probability 0 has the log-likelihood -inf. Raises DataError if a
    log-likelihood is nan. Collective over loaded.grid.world.
    """
    shape = (len(items), max(len(item) for item in items))
    found = -distribute(loaded.grid, shape, lambda i: row_losses(loaded, [(row.ids, row.counted) for row in items[i]]))
    if np.isnan(found).any():
        raise loaded.diverged("log-likelihood of a choice")
    return found

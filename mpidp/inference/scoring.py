"""How likely a trained model finds given texts: pieces of work dealt out over the ranks, each computed once and as if alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from mpi4py import MPI

from mpidp.inference.choices import Scored
from mpidp.inference.loading import Loaded
from mpidp.parallel.engine import plain_losses
from mpidp.parallel.grid import Grid
from mpidp.runtime.world import polite_barrier

UNSCORED = -100  # a target that does not count


@torch.no_grad()
def row_losses(loaded: Loaded, rows: Sequence[tuple[Sequence[int], int]]) -> list[float]:
    """Of each row (ids, n) the sum of the last n ids' losses in nats. Rows are padded at their ends, which what comes before
    cannot see. The same on all ranks of a replica. Collective over loaded.grid.model."""
    ids = torch.zeros(len(rows), max(len(row) for row, _ in rows), dtype=torch.int64)
    targets = torch.full_like(ids, UNSCORED)
    for i, (row, n) in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
        targets[i, len(row) - n : len(row)] = ids[i, len(row) - n : len(row)]
    logits, losses, found = loaded.through(ids[:, :-1]), loaded.losses or plain_losses, [0.0] * len(rows)
    if logits is not None:
        wanted = targets[:, 1:].to(logits.device)
        found = [float(losses(row.float(), its)) for row, its in zip(logits, wanted, strict=True)]
    return found if loaded.stages is None else loaded.stages.settle(found)


def dealt_out(grid: Grid, shape: tuple[int, int], work: Callable[[int], Sequence[float]]) -> np.ndarray:
    """(n, width) float64 of n pieces of work, each done by one replica: the same bits at any number of them. work(i): at most
    width figures; collective over grid.model. Collective over grid.world."""
    found = np.zeros(shape)
    for i in range(grid.world.rank // grid.parts, shape[0], grid.world.size // grid.parts):
        figures = work(i)
        if grid.model.rank == 0:
            found[i, : len(figures)] = figures
    polite_barrier(grid.world)
    grid.world.Allreduce(MPI.IN_PLACE, found)  # each entry has one writer
    return found


def windows(targets: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, scored, end) of windows in which each of `targets` targets counts once: those in [scored, end) do, those from begin
    on are seen. After the first, each window ends `stride` further, and is seq_len long. Pure."""
    found, end = [], 0
    while end < targets:
        scored, end = end, min(targets, end + (stride if end else seq_len))
        found.append((max(0, end - seq_len), scored, end))
    return found


def text_loss(loaded: Loaded, ids: np.ndarray, seq_len: int, stride: int, together: int) -> float:
    """Sum of the losses in nats of all but the first of ids, each seen after at least seq_len - stride others where there
    are so many. together: windows at a time. Collective over loaded.grid.world."""
    cut = windows(len(ids) - 1, seq_len, stride)
    groups = [cut[i : i + together] for i in range(0, len(cut), together)]

    def work(i: int) -> list[float]:
        return row_losses(loaded, [(ids[begin : end + 1].tolist(), end - scored) for begin, scored, end in groups[i]])

    return float(sum(dealt_out(loaded.grid, (len(groups), together), work).ravel().tolist()))


def log_likelihoods(loaded: Loaded, items: Sequence[Sequence[Scored]]) -> np.ndarray:
    """(items, most choices) float64, in nats. Collective over loaded.grid.world."""
    shape = (len(items), max(len(item) for item in items))
    return -dealt_out(loaded.grid, shape, lambda i: row_losses(loaded, [(row.ids, row.counted) for row in items[i]]))

"""Attention within packed documents. A position attends only to positions of its own document. Pure torch, no MPI.

Short sequences use one dense mask. In longer sequences, each document is computed like a separate sequence. The memory is then
proportional to T and not to T x T. On a GPU, short documents that follow each other are computed as a group, with a small mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpidp.model.scores import Scores, additive, causal, masked, near

DENSE = 256  # the longest sequence that uses a dense mask
GROUP = {"cpu": 0, "cuda": 1024}  # largest number of positions of a group of documents


def dense_mask(ids: Tensor, window: int) -> Tensor:
    """Return a bool mask (B, 1, T, T). Entry (b, 0, i, j) says whether position i of sequence b may attend to position j. ids:
    the number of each position's document, (B, T). window: the size of the sliding window, or 0 for none."""
    places = torch.arange(ids.shape[1], device=ids.device)
    return (near(places, places, window) & (ids.unsqueeze(1) == ids.unsqueeze(2))).unsqueeze(1)


class Documents:
    """The positions of the packed documents of a batch. All layers use the same object."""

    def __init__(self, ids: Tensor) -> None:
        """ids: the number of each position's document, (B, T). The positions of a document follow each other."""
        self.ids = ids
        # for each sequence: (length of a group of documents, whether the group is one document), for each of its groups
        self.groups = [_groups(row, GROUP.get(ids.device.type, 0)) for row in _lengths(ids)]
        self._masks: dict[tuple[int, int, int, torch.dtype], Tensor] = {}

    def mask(self, row: int, begin: int, end: int, window: int, dtype: torch.dtype) -> Tensor:
        """Return the additive mask of a group of documents, (1, 1, n, n). row: the index of the sequence in the batch. begin,
        end: the group has the positions begin, ..., end - 1 of this sequence. window: the size of the sliding window, or 0 for
        none."""
        key = (row, begin, window, dtype)
        if key not in self._masks:
            self._masks[key] = additive(dense_mask(self.ids[row : row + 1, begin:end], window), dtype)
        return self._masks[key]


def within(documents: Documents, q: Tensor, k: Tensor, v: Tensor, how: Scores) -> Tensor:
    """Return attention (B, H, T, E) in which each position attends only to positions of its own document. q, k, v: (B, H, T,
    E). how: the layer's sliding window, scale and soft-cap."""
    found = []
    for row, groups in enumerate(documents.groups):
        lengths, begin = [length for length, _ in groups], 0
        parts = (x[row : row + 1].split(lengths, dim=2) for x in (q, k, v))
        for (length, is_one), own_q, own_k, own_v in zip(groups, *parts, strict=True):
            mask = None if is_one else documents.mask(row, begin, begin + length, how.window, q.dtype)
            found.append(causal(own_q, own_k, own_v, how) if mask is None else masked(own_q, own_k, own_v, mask, how))
            begin += length
    return torch.cat(found, dim=2).view(q.shape[1], q.shape[0], q.shape[2], q.shape[3]).transpose(0, 1)


def _lengths(ids: Tensor) -> list[list[int]]:
    """Return, for each sequence of the batch, the lengths of its documents."""
    begins = (ids[:, 1:] != ids[:, :-1]).cpu()
    edges = [[0, *(row.nonzero().flatten() + 1).tolist(), ids.shape[1]] for row in begins]
    return [[b - a for a, b in zip(row, row[1:], strict=False)] for row in edges]


def _groups(lengths: list[int], most: int) -> list[tuple[int, bool]]:
    """Combine documents that follow each other into groups of at most `most` positions. A longer document is a group of its
    own. For each group, return (number of positions, whether the group has a single document)."""
    found: list[tuple[int, bool]] = []
    for length in lengths:
        if found and found[-1][0] + length <= most:
            found[-1] = (found[-1][0] + length, False)
        else:
            found.append((length, True))
    return found

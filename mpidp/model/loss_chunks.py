"""The loss can be computed in chunks of positions, so that not all logits are in memory at the same time (train.loss). This
module chooses the number of positions per chunk. Imports neither torch nor MPI."""

from __future__ import annotations

from mpidp.model.shape import Shape, TransformerShape

CHUNK_LOGITS = 2**24  # number of logits per chunk, 64 MiB in float32
AUTO_CHUNKS = 4  # train.loss=auto uses chunks only if there are at least this many


def chunk_rows(loss: str, shape: Shape, positions: int) -> int:
    """Return the number of positions per chunk, or 0 if the loss is computed from all logits at once. All ranks get the same
    result.

    loss: train.loss. positions: number of positions of a full micro-batch. Pure.
    """
    if not isinstance(shape, TransformerShape) or loss == "whole":
        return 0
    rows = max(64, CHUNK_LOGITS // shape.vocab_size // 64 * 64)
    return rows if loss == "chunked" or positions >= AUTO_CHUNKS * rows else 0

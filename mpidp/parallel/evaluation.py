"""Which windows an evaluation reads."""

from __future__ import annotations

import numpy as np


def _num_pairs(length: int, seq_len: int) -> int:
    """How many pairs _windows makes of so many inputs."""
    return (length >= seq_len) + (length % seq_len > 0)


def _windows(length: int, seq_len: int) -> list[np.ndarray]:
    """Of so many inputs the places of the full windows, (n, T + 1), and of a short rest, (1, rest + 1): inputs and their targets.
    Pure."""
    full = length // seq_len
    parts = [np.arange(full)[:, None] * seq_len + np.arange(seq_len + 1)] if full else []
    return parts + ([np.arange(full * seq_len, length + 1)[None]] if length % seq_len else [])

"""Cuts the data of an evaluation into windows."""

from __future__ import annotations

import numpy as np


def num_pairs(length: int, seq_len: int) -> int:
    """Return the number of arrays that windows_of returns. Pure."""
    return (length >= seq_len) + (length % seq_len > 0)


def windows_of(length: int, seq_len: int) -> list[np.ndarray]:
    """Return the positions of inputs and targets for `length` inputs: an array (n, T + 1) of the full windows, then an array (1,
    rest + 1) of the last, shorter window. An array without windows is omitted. Pure."""
    full = length // seq_len
    parts = [np.arange(full)[:, None] * seq_len + np.arange(seq_len + 1)] if full else []
    return parts + ([np.arange(full * seq_len, length + 1)[None]] if length % seq_len else [])

"""Divides the data of an evaluation into windows of seq_len inputs."""

from __future__ import annotations

import numpy as np


def num_pairs(length: int, seq_len: int) -> int:
    """Return the number of arrays in the result of windows_of(length, seq_len): 0, 1 or 2. Pure."""
    return (length >= seq_len) + (length % seq_len > 0)


def windows_of(length: int, seq_len: int) -> list[np.ndarray]:
    """Divide `length` inputs into windows of `seq_len` inputs. Return the indices of the tokens in each window, as at most two
    arrays. A window of T inputs has T + 1 tokens, because targets are the next tokens. The first array, (n, seq_len + 1),
    contains the n full windows. The second array, (1, rest + 1), contains the shorter last window. An array without windows is
    omitted. Pure."""
    full = length // seq_len
    parts = [np.arange(full)[:, None] * seq_len + np.arange(seq_len + 1)] if full else []
    return parts + ([np.arange(full * seq_len, length + 1)[None]] if length % seq_len else [])

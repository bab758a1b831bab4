"""A keyed permutation of 0..n-1 that stores no table. It is a Feistel network with cycle walking."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

ROUNDS = 8  # number of rounds of the Feistel network


@lru_cache(maxsize=1024)
def keys_of(*key: object) -> np.ndarray:
    """Return one key for each round of the Feistel network: (ROUNDS, 1) uint64. `key`: values from which the keys are computed.
    The repr of a value must be the same in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)[:, None]


def permute(x: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Apply a keyed permutation of 0..n-1 to each element of `x`, a uint64 array. `keys`: the result of keys_of()."""
    return _walk(x, n, keys, inverse=False)


def unpermute(x: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Apply the inverse of permute() to each element of `x`, a uint64 array. `keys`: the result of keys_of()."""
    return _walk(x, n, keys, inverse=True)


def _walk(x: np.ndarray, n: int, keys: np.ndarray, inverse: bool) -> np.ndarray:
    """Apply a Feistel network, which permutes 0..m-1, to each element of `x`. m is the smallest power of 4 that is at least n.
    While a result is n or more, apply the network to this result again (cycle walking)."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    out = _feistel(x, half_bits, keys, inverse)
    while (outside := out >= n).any():
        out[outside] = _feistel(out[outside], half_bits, keys, inverse)
    return out


def _feistel(x: np.ndarray, half_bits: int, keys: np.ndarray, inverse: bool) -> np.ndarray:
    """Apply a balanced Feistel network to numbers of 2 x half_bits bits. All machines give the same result."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = x >> shift, x & mask
    if inverse:
        for key in keys[::-1]:
            left, right = right ^ (_mix(left + key) & mask), left
    else:
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the finalizer of splitmix64, in which each input bit affects each output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed

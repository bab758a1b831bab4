"""Samples the next token from logits. Sampling runs on the CPU, so that all devices and ranks draw the same tokens. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

COLDEST = 1e-6  # a lower temperature selects the likeliest token, because dividing by it could overflow


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    temperature: the logits are divided by it. A temperature below COLDEST, such as 0, selects the likeliest token. top_k: sample
    from the top_k likeliest tokens; 0: from all. top_p: of these, sample from the smallest set of likeliest tokens with at least
    this total probability; 1: from all (nucleus sampling, Holtzman 2020).
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """Return a token id sampled from logits (V,) on the CPU."""
        if self.temperature < COLDEST:
            return int(logits.argmax())
        if 0 < self.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], float("-inf"))
        probabilities = torch.softmax(logits / self.temperature, dim=-1)
        if self.top_p < 1:
            probabilities = nucleus(probabilities, self.top_p)
        return int(torch.multinomial(probabilities, 1, generator=generator))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of the likeliest tokens with a total probability of at least top_p. Set the probabilities of the
    other tokens to zero.

    Returns (V,) for probabilities (V,), not rescaled. If two tokens have equal probabilities, the token with the lower id comes
    first. Pure.
    """
    ordered, ids = probabilities.sort(descending=True, stable=True)
    before = ordered.double().cumsum(0) - ordered
    kept = ids[before < top_p]
    return torch.zeros_like(probabilities).index_copy(0, kept, probabilities[kept])


def seed_of(seed: int, index: int) -> int:
    """Return a prompt's seed. It depends only on `seed` and the prompt's index, so ranks and batches do not change the output.

    The first prompt's seed is `seed` itself. Pure.
    """
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little") >> 1

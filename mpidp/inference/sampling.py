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

    temperature: divides the logits. If it is below COLDEST, the likeliest token is selected. top_k: only the top_k likeliest
    tokens can be drawn. 0: all tokens can be drawn. top_p: of the tokens that top_k allows, only the likeliest ones can be drawn:
    the fewest tokens whose total probability is at least top_p (nucleus sampling, Holtzman 2020). 1: no limit.
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
    """Keep the likeliest tokens: the fewest tokens whose total probability is at least top_p. Set the probabilities of all other
    tokens to zero.

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

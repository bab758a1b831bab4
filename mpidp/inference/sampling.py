"""Samples the next token from logits on the CPU. All devices and ranks draw the same tokens. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

COLDEST = 1e-6  # a lower temperature selects the likeliest token, because dividing by it could overflow


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    temperature: divides the logits. Below COLDEST, the likeliest token is selected. top_k: only the top_k likeliest tokens can
    be drawn. If top_k is 0, all tokens can be drawn. top_p: of these tokens, the likeliest are kept until their total
    probability is at least top_p. Only the kept tokens can be drawn (nucleus sampling, Holtzman 2020). If top_p is 1, all are
    kept.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """Return a token id sampled from logits (V,). The logits must be on the CPU."""
        if self.temperature < COLDEST:
            return int(logits.argmax())
        if 0 < self.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], float("-inf"))
        probabilities = torch.softmax(logits / self.temperature, dim=-1)
        if self.top_p < 1:
            probabilities = nucleus(probabilities, self.top_p)
        return int(torch.multinomial(probabilities, 1, generator=generator))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Return the probabilities, with zeros for all tokens outside the nucleus. The nucleus has the likeliest tokens, as many as
    are needed for a total probability of at least top_p.

    probabilities: (V,). The result is (V,), not rescaled. If two tokens are equally likely, the token with the lower id comes
    first. Pure.
    """
    ordered, ids = probabilities.sort(descending=True, stable=True)
    before = ordered.double().cumsum(0) - ordered
    kept = ids[before < top_p]
    return torch.zeros_like(probabilities).index_copy(0, kept, probabilities[kept])


def seed_of(seed: int, index: int) -> int:
    """Return the seed of the prompt with the number `index`. It does not depend on ranks or batches.

    The seed of prompt 0 is `seed` itself. Pure.
    """
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little") >> 1

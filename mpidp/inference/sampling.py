"""How the next token is chosen from its logits. Pure; drawn on the CPU, so that every device and every rank draws alike."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Divide by the temperature (0: the likeliest token), keep the top_k likeliest (0: all), of these the fewest that have top_p
    of the probability (1: all; Holtzman 2020, nucleus sampling), and draw."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """An id, from logits (V,) on the CPU."""
        if self.temperature == 0:
            return int(logits.argmax())
        if 0 < self.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], float("-inf"))
        probabilities = torch.softmax(logits / self.temperature, dim=-1)
        if self.top_p < 1:
            probabilities = nucleus(probabilities, self.top_p)
        return int(torch.multinomial(probabilities, 1, generator=generator))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Those of the fewest likeliest tokens that together have top_p at least, zero elsewhere: (V,) -> (V,), not scaled to 1. Of
    equals, the lower id comes first. Pure."""
    ordered, ids = probabilities.sort(descending=True, stable=True)
    before = ordered.double().cumsum(0) - ordered
    kept = ids[before < top_p]
    return torch.zeros_like(probabilities).index_copy(0, kept, probabilities[kept])


def seed_of(seed: int, index: int) -> int:
    """Of a prompt's draws: by its place in the file alone, so that neither ranks nor batches change what is drawn. The first
    one's is the seed itself. Pure."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little") >> 1

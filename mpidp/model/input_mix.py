"""Mixes the output of the embedding into the input of each block (model.input_mix). Pure torch, no MPI."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class InputMix(nn.Module):
    """Computes a x + b x0. x0 is the output of the embedding, and a and b are learned numbers (modded-nanogpt, nanochat).

    Initially a = 1 and b = 0, so the untrained model computes the same results as a model without this module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        """Return (B, T, D) for x (B, T, D) and x0 (B, T, D)."""
        return mixed(x, x0, self.weight)


def mixed(x: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """Return weight[0] x + weight[1] x0. Pure.

    The bits of the gradient of `weight` do not depend on the number of threads.
    """
    a, b = weight.to(x.dtype).unsqueeze(1).expand(2, x.shape[-1])
    return a * x + b * x0

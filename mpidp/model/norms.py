"""RMSNorm (Zhang 2019) and LayerNorm (Ba 2016). The gain is either weight or 1 + weight. Pure torch, no MPI."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpidp.model.shape import TransformerShape


class Norm(nn.Module):
    """A norm over the last dimension. Initially the gain is 1 and the bias is 0."""

    def __init__(self, shape: TransformerShape, width: int, kind: str = "") -> None:
        """width: size of the last dimension. kind: "rms", "layer", or "" for the value of model.norm."""
        super().__init__()
        self.eps, self.plus_one = shape.norm_eps, shape.norm_plus_one
        self.weight = nn.Parameter(torch.zeros(width) if self.plus_one else torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if (kind or shape.norm) == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x, (..., width)."""
        return self.normalized(x, self.weight, self.bias)

    def normalized(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the normalized x, with the arguments `weight` and `bias` instead of this module's parameters."""
        gain, x = self.gain(weight), x.to(weight.dtype)  # norms are computed in float32, also after 16-bit products
        if bias is None:
            return F.rms_norm(x, weight.shape, gain, self.eps)
        if x.device.type == "cpu":  # torch's kernel adds the gradients of gain and bias by threads, so bits depend on the threads
            return F.layer_norm(x, weight.shape, None, None, self.eps) * gain + bias
        return F.layer_norm(x, weight.shape, gain, bias, self.eps)

    def gain(self, weight: Tensor) -> Tensor:
        """Return weight or 1 + weight, by which normalized values are multiplied."""
        return 1 + weight if self.plus_one else weight

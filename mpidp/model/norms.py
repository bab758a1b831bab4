"""RMSNorm (Zhang 2019) and LayerNorm (Ba 2016), with a gain of either weight or 1 + weight. Pure torch, no MPI."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpidp.model.shape import TransformerShape


class Norm(nn.Module):
    """A norm over the last dimension. Initially the gain is 1 and the bias is 0."""

    def __init__(self, shape: TransformerShape, width: int, kind: str = "") -> None:
        """width: size of the last dimension. kind: "rms" or "layer"; "" means model.norm."""
        super().__init__()
        self.eps, self.plus_one = shape.norm_eps, shape.norm_plus_one
        self.weight = nn.Parameter(torch.zeros(width) if self.plus_one else torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if (kind or shape.norm) == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x, (..., width)."""
        return self.normalized(x, self.weight, self.bias)

    def normalized(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Normalize x with the given weight and bias instead of this module's, for example with parameters whose gradients
        are summed over ranks."""
        gain, x = self.gain(weight), x.to(weight.dtype)  # norms are computed in float32, also after 16-bit products
        if bias is None:
            return F.rms_norm(x, weight.shape, gain, self.eps)
        if x.device.type == "cpu":  # torch's kernel adds the gradients of gain and bias by threads, so bits depend on the threads
            return F.layer_norm(x, weight.shape, None, None, self.eps) * gain + bias
        return F.layer_norm(x, weight.shape, gain, bias, self.eps)

    def gain(self, weight: Tensor) -> Tensor:
        """Return the gain, by which normalized values are multiplied: weight or 1 + weight."""
        return 1 + weight if self.plus_one else weight

"""The feed-forward layer of a block, and the last linear layer of a residual branch. Pure torch, no MPI."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from mpidp.model.part import Part
from mpidp.model.products import Linear, linear
from mpidp.model.shape import TransformerShape


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu2": _relu2,
}


class OutputLinear(nn.Linear):
    """The last linear layer of a residual branch (attention or feed-forward). forward() does not add the bias, because the
    bias must be added after the sum over tensor-parallel ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T, without the bias."""
        return linear(x, self.weight)

    def add_bias(self, y: Tensor) -> Tensor:
        """Return y + bias. If there is no bias, return y."""
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FeedForward(nn.Module):
    """Computes down(act(gate(x)) * up(x)), which is SwiGLU for act = silu (Shazeer 2020). With model.gated=false, computes
    down(act(up(x))).

    Block adds the bias of the layer `down`.
    """

    def __init__(self, shape: TransformerShape, part: Part) -> None:
        super().__init__()
        hidden_dim, self.activation = len(part.own_range(shape.hidden_dim)), ACTIVATIONS[shape.activation]
        self.gate = Linear(shape.model_dim, hidden_dim, bias=shape.mlp_bias) if shape.gated else None
        self.up = Linear(shape.model_dim, hidden_dim, bias=shape.mlp_bias)
        self.down = OutputLinear(hidden_dim, shape.model_dim, bias=shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, D) for x (B, T, D)."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))

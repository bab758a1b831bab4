"""A block of the Transformer, which consists of attention and a feed-forward layer. Pure torch, no MPI."""

from __future__ import annotations

from torch import Tensor, nn

from mpidp.model.attention import Attention, Mask, Past
from mpidp.model.dropout import keyed_dropout
from mpidp.model.feed_forward import FeedForward, OutputLinear
from mpidp.model.input_mix import InputMix
from mpidp.model.norms import Norm
from mpidp.model.part import Part
from mpidp.model.shape import TransformerShape


class Block(nn.Module):
    """Computes x + attention(norm(x)), then x + feed_forward(norm(x)). attention and feed_forward are called the residual
    branches. Dropout is applied to the output of each branch.

    model.norm_place can add norms after the branches. With model.parallel, both branches get the same input.
    """

    def __init__(self, shape: TransformerShape, part: Part, layer: int = 0) -> None:
        super().__init__()
        self.dropout, self.part, self.parallel, self.residual_scale = shape.dropout, part, shape.parallel, shape.residual_scale
        self.input_mix = InputMix() if shape.input_mix else None
        norms = {name: Norm(shape, shape.model_dim) for name in shape.norms()}
        self.attention_norm = norms.get("attention_norm", nn.Identity())
        self.attention = Attention(shape, part, layer)
        self.attention_out_norm = norms.get("attention_out_norm", nn.Identity())
        self.feed_forward_norm = norms.get("feed_forward_norm", nn.Identity())
        self.feed_forward = FeedForward(shape, part)
        self.feed_forward_out_norm = norms.get("feed_forward_out_norm", nn.Identity())

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, key: Tensor | None, past: Past | None = None,
        x0: Tensor | None = None,
    ) -> Tensor:
        """Return (B, T, D) for x (B, T, D). With sequence parallelism, x has only this rank's positions. cos, sin: the rotary
        tables of all positions. mask, past: see Attention.forward(). key: the dropout key, or None for no dropout. x0: the
        output of the embedding, which model.input_mix needs."""
        length = cos.shape[-2]
        if self.input_mix is not None and x0 is not None:
            x = self.input_mix(x, x0)
        y = self.attention(self.attention_norm(x), cos, sin, mask, past)
        attended = self._finished(y, self.attention.o, self.attention_out_norm, key, 1, length)
        if not self.parallel:
            x = x + attended
        y = self.feed_forward(self.feed_forward_norm(x))
        fed = self._finished(y, self.feed_forward.down, self.feed_forward_out_norm, key, 2, length)
        return x + attended + fed if self.parallel else x + fed

    def _finished(
        self, y: Tensor, output: OutputLinear, norm: nn.Module, key: Tensor | None, site: int, length: int
    ) -> Tensor:
        """Return the final output of a branch, (B, T, D), after bias, norm, dropout and scale. y: the branch's output without
        bias, summed over tensor-parallel ranks. site: the number of this dropout in the block. length: number of positions of
        the whole sequence."""
        y = keyed_dropout(norm(output.add_bias(y)), self.dropout, key, site, self.part.positions(length), length)
        return y if self.residual_scale == 1.0 else y * self.residual_scale

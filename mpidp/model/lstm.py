"""An LSTM language model (Hochreiter 1997). Dropout is placed as in Zaremba 2014. Pure torch, no MPI.

The model consists of an embedding, num_layers LSTMs of width model_dim, and a projection to the vocabulary. The projection may
share the embedding's weight (Press 2017). The hidden state is zero at the start of each training window. B: batch, T:
positions, D: model_dim, V: vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mpidp.errors import UsageError
from mpidp.model.dropout import keyed_dropout
from mpidp.model.part import Part, whole
from mpidp.model.shape import LSTMShape


class LSTM(nn.Module):
    """The LSTM language model. It maps tokens (B, T) to logits (B, T, V)."""

    recompute = False

    def new_cache(self, positions: int) -> None:
        """Return None, because this model generates without a cache. Independent."""

    def __init__(self, shape: LSTMShape, seed: int = 0, part: Part | None = None) -> None:
        """Make the layers, and initialize them on the CPU. A seed gives the same float32 values on every device."""
        super().__init__()
        self.shape, self.part = shape, part or whole(shape)
        d = shape.model_dim
        self.embedding = nn.Embedding(shape.vocab_size, d)
        self.layers = nn.ModuleList(nn.LSTM(d, d, batch_first=True) for _ in range(shape.num_layers))
        self.head = nn.Linear(d, shape.vocab_size, bias=False)
        if shape.tie_embeddings:
            self.head.weight = self.embedding.weight
        if not self.embedding.weight.is_meta:
            self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Initialize the parameters.

        The weights of embedding and head are drawn from a normal distribution with std 1/sqrt(D). The matrices of LSTM layers
        are drawn uniformly from +-1/sqrt(D). The biases of forget gates are 1 (Jozefowicz 2015), and other biases are 0.
        """
        generator, bound, d = torch.Generator().manual_seed(seed), 1.0 / math.sqrt(self.shape.model_dim), self.shape.model_dim
        for name, p in sorted(self.named_parameters()):
            if p.dim() == 1:
                p.zero_()
                if name.endswith("bias_ih_l0"):
                    p[d : 2 * d] = 1.0
            elif name.startswith("layers."):
                nn.init.uniform_(p, -bound, bound, generator=generator)
            else:
                nn.init.normal_(p, std=bound, generator=generator)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, doc_ids: Tensor | None = None, key: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T, V) of the next token.

        x: tokens (B, T) int64. positions: ignored. key: the dropout key, an int64 scalar tensor, or None for no dropout
        (evaluation). Raises UsageError if doc_ids is given, because packed documents are not supported.
        """
        if doc_ids is not None:
            raise UsageError.on_every_rank(
                "model.kind=lstm does not support packed documents: its state would carry over into the next document. "
                "Prepare the data without packing, or use model.kind=transformer"
            )
        p = self.shape.dropout
        x = keyed_dropout(self.embedding(x), p, key, 0)
        for i, layer in enumerate(self.layers, 1):
            x = keyed_dropout(layer(x)[0], p, key, i)
        return self.head(x)

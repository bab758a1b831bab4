"""An LSTM language model (Hochreiter 1997; Zaremba 2014 for where dropout stands). Pure torch; it knows nothing of MPI.

Embedding, num_layers LSTMs of model_dim, projection to the vocabulary, which may be the embedding (Press 2017). The hidden state
is zero at the beginning of every window: windows are shuffled, so none follows another, and a micro-batch is the same whoever
computes it. B: batch, T: positions, D: model_dim, V: vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mpidp.errors import UsageError
from mpidp.model.part import Part, whole
from mpidp.model.shape import LSTMShape
from mpidp.model.transformer import keyed_dropout


class LSTM(nn.Module):
    """The language model: tokens (B, T) -> logits (B, T, V)."""

    recompute = False

    def new_cache(self, positions: int) -> None:
        """None: it is generated from without one. Independent."""

    def __init__(self, shape: LSTMShape, seed: int = 0, part: Part | None = None) -> None:
        """The same seed gives the same float32 parameters on every device: they are drawn on the CPU."""
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
        """Embedding and head normal with std 1/sqrt(D), cells uniform with that bound, biases 0, but 1 of forget gates
        (Jozefowicz 2015)."""
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
        """Logits (B, T, V) of the next token.

        x: tokens (B, T) int64; positions: have no meaning here; doc_ids: UsageError when given: the state would have to be set
        back within a window; key: int64 scalar tensor that dropout is keyed by, None (evaluation) for no dropout.
        """
        if doc_ids is not None:
            raise UsageError.on_every_rank(
                "model.kind=lstm on packed documents: its state would go on from one document into the next. Prepare the data "
                "without packing, or use model.kind=transformer"
            )
        p = self.shape.dropout
        x = keyed_dropout(self.embedding(x), p, key, 0)
        for i, layer in enumerate(self.layers, 1):
            x = keyed_dropout(layer(x)[0], p, key, i)
        return self.head(x)

"""Train a masked language model (Devlin 2018, BERT, section 3.1) on the token shards that mpidp.train reads.

    mpirun -np 2 python -m mpi4py examples/masked.py shards/stdlib

15% of the tokens are predicted. Of these, 80% are masked, 10% are replaced by a random token, and 10% stay the same. The random
choice depends on the epoch and the micro-batch, not on the rank. The loss is the mean over the predicted tokens of the batch.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpidp.library as mpidp
from mpidp.data.shards import TokenStream

LENGTH = 64


class Windows:
    """The training shards as a map-style dataset of windows (LENGTH,) of consecutive tokens."""

    def __init__(self, path: str) -> None:
        self.stream = TokenStream(path, "train")

    def __len__(self) -> int:
        return self.stream.num_tokens // LENGTH

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(self.stream.read(i * LENGTH, LENGTH).astype("int64"))


class Encoder(nn.Module):
    """Map partly masked tokens (B, LENGTH) to logits (B, LENGTH, V). The token id of the mask is V."""

    def __init__(self, vocab_size: int, dim: int, layers: int) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(vocab_size + 1, dim), nn.Parameter(torch.randn(LENGTH, dim) / dim**0.5)
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.1, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens) + self.places))


def masked(tokens: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Mask some of the tokens at random. Return (masked tokens, targets). Other targets are -100."""
    predicted, how, other = torch.rand(tokens.shape) < 0.15, torch.rand(tokens.shape), torch.randint(vocab_size, tokens.shape)
    seen = torch.where(how < 0.8, vocab_size, torch.where(how < 0.9, other, tokens))
    return torch.where(predicted, seen, tokens), torch.where(predicted, tokens, -100)


def train(path: str, comm: Any = None, steps: int = 300, batch: int = 16, dim: int = 64, layers: int = 2) -> dict[str, Any]:
    """Train the model. Return {losses, sha256, rank}. Collective over comm."""
    torch.manual_seed(0)
    vocab_size = (windows := Windows(path)).stream.vocab_size
    model, losses, items = Encoder(vocab_size, dim, layers), [], mpidp.from_dataset(windows, batch=batch, seed=0)
    optimizer = mpidp.DataParallel(model, torch.optim.AdamW(model.parameters(), 1e-3), items, clip=1.0, threads=1, comm=comm)
    while optimizer.steps < steps:
        for tokens in optimizer.micro_batches():
            seen, targets = masked(tokens, vocab_size)
            optimizer.backward(F.cross_entropy(model(seen).flatten(0, 1), targets.flatten()), int((targets >= 0).sum()))
            if optimizer.step():
                losses.append(optimizer.loss)
            if optimizer.steps == steps:
                break
    return {"losses": losses, "sha256": optimizer.sha256(), "rank": optimizer.rank}


if __name__ == "__main__":
    found = train(sys.argv[1] if len(sys.argv) > 1 else "shards/stdlib")
    if found["rank"] == 0:
        first, last = (sum(part) / 20 for part in (found["losses"][:20], found["losses"][-20:]))
        print(f"loss of masked tokens: {first:.3f} at first, {last:.3f} at the end; weights {found['sha256'][:16]}")

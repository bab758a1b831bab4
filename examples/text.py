"""Train a text classifier that predicts from which package of Python's standard library a line of source code comes.

    mpirun -np 2 python -m mpi4py examples/text.py

The input of the model is the bag of hashed character trigrams of the line (Joulin 2016, fastText). The weights are the same, bit
for bit, on any number of ranks.
"""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpidp.library as mpidp

PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml")
EACH, BUCKETS, LENGTH = 600, 4096, 64


def lines() -> list[tuple[Tensor, int]]:
    """Return [(trigrams (LENGTH,), package index)] for at most `EACH` distinct lines of each package, taken evenly from its
    files."""
    found = []
    for number, package in enumerate(PACKAGES):
        files = sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py"))
        texts = [line.strip() for file in files for line in file.read_text(errors="replace").splitlines()]
        texts = list(dict.fromkeys(line for line in texts if len(line) >= 30))
        found += [(trigrams(line), number) for line in texts[:: max(1, len(texts) // EACH)][:EACH]]
    return found


def trigrams(line: str) -> Tensor:
    """Return the ids (at least 1) of the first LENGTH trigrams, padded with 0. The ids are computed with crc32, because
    Python's hash() differs between processes."""
    ids = [1 + zlib.crc32(line[i : i + 3].encode()) % BUCKETS for i in range(len(line) - 2)][:LENGTH]
    return torch.tensor(ids + [0] * (LENGTH - len(ids)))


class Bag(nn.Module):
    """The mean embedding of a line's trigrams and a linear layer: (B, LENGTH) -> (B, packages)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BUCKETS + 1, 64, padding_idx=0)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(64, len(PACKAGES)))

    def forward(self, ids: Tensor) -> Tensor:
        """Compute the logits from the mean over the trigrams that are not padding."""
        return self.head(self.embedding(ids).sum(1) / (ids > 0).sum(1, keepdim=True).clamp(min=1))


def train(comm: Any = None, epochs: int = 6) -> dict[str, Any]:
    """Train the classifier. Return {right: share of correct held-out lines, loss, sha256, rank}. Collective over comm."""
    texts = lines()
    held_out, training = texts[::10], [one for i, one in enumerate(texts) if i % 10]
    torch.manual_seed(0)
    model = Bag()
    items = mpidp.from_dataset(training, batch=64, seed=0)
    optimizer = mpidp.DataParallel(model, torch.optim.AdamW(model.parameters(), 1e-2), items, threads=1, comm=comm)
    for _ in range(epochs):
        for ids, package in optimizer.micro_batches():
            optimizer.backward(F.cross_entropy(model(ids), package))
            optimizer.step()
    with torch.no_grad():
        predicted = model.eval()(torch.stack([ids for ids, _ in held_out])).argmax(1)
    right = (predicted == torch.tensor([package for _, package in held_out])).float().mean().item()
    return {"right": right, "loss": optimizer.loss, "sha256": optimizer.sha256(), "rank": optimizer.rank}


if __name__ == "__main__":
    found = train()
    if found["rank"] == 0:
        print(f"{100 * found['right']:.1f}% of lines are right ({len(PACKAGES)} packages); weights {found['sha256'][:16]}")

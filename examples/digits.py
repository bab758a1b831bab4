"""Train a classifier of scikit-learn's handwritten digits in a plain PyTorch loop. The five lines that use mpidp end in #.

    mpirun -np 2 python -m mpi4py examples/digits.py [strategy.name=local comm.compress=int8 ...]

The weights are the same, bit for bit, on any number of ranks. With compression, or with strategies other than synchronous, the
weights depend on the number of ranks.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import mpidp.library as mpidp  #

HELD_OUT = 297


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (1797, 1, 8, 8) in [0, 1] and their labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        sys.exit(f"examples/digits.py needs scikit-learn for its 1,797 images ({error}): python -m pip install scikit-learn")
    loaded = load_digits()
    return torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(loaded.target)


def train(comm: Any = None, epochs: int = 10, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train the classifier. Return {right: number of correct held-out digits, loss, sha256, rank}. Collective over comm."""
    images, labels = digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(0.1), nn.Linear(32 * 16, 10),
    )
    items = mpidp.from_dataset(TensorDataset(images[HELD_OUT:], labels[HELD_OUT:]), batch=64, seed=0)  #
    adamw = torch.optim.AdamW(model.parameters(), 3e-3)
    optimizer = mpidp.DataParallel(model, adamw, items, settings, steps=epochs * len(items), threads=1, comm=comm)  #
    for _ in range(epochs):
        for x, y in optimizer.micro_batches():  #
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            optimizer.backward(loss)  #
            optimizer.step()
    with torch.no_grad():
        right = (model.eval()(images[:HELD_OUT]).argmax(1) == labels[:HELD_OUT]).sum().item()
    return {"right": right, "loss": optimizer.loss, "sha256": optimizer.sha256(), "rank": optimizer.rank}


if __name__ == "__main__":
    found = train(settings=dict(word.split("=", 1) for word in sys.argv[1:]))
    if found["rank"] == 0:
        print(f"{found['right']} of {HELD_OUT} held-out digits are right, weights {found['sha256'][:16]}")

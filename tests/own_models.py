"""Valid and invalid custom models: model.kind=tests.own_models:NAME."""

from __future__ import annotations

import torch
from mpi4py import MPI
from torch import Tensor, nn


class Gru(nn.Module):
    """Valid: with torch's dropout and a constant buffer."""

    scale: Tensor

    def __init__(self, vocab_size: int, model_dim: int, dropout: float = 0.0, depth: int = 1) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(vocab_size, model_dim), nn.GRU(model_dim, model_dim, depth, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(model_dim, vocab_size))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(x))[0]) * self.scale


class Ranked(Gru):
    """Invalid: initial weights differ between ranks."""

    def __init__(self, vocab_size: int, model_dim: int) -> None:
        torch.manual_seed(MPI.COMM_WORLD.rank)
        super().__init__(vocab_size, model_dim)


def wider(vocab_size: int, model_dim: int) -> Gru:
    """Invalid: the model differs between ranks."""
    return Gru(vocab_size, model_dim + MPI.COMM_WORLD.rank)


def scaled(vocab_size: int, model_dim: int) -> Gru:
    """Invalid: a constant differs between ranks."""
    made = Gru(vocab_size, model_dim)
    made.scale += MPI.COMM_WORLD.rank
    return made


def unsaid(vocab_size: int, model_dim: int):  # type: ignore[no-untyped-def]  # noqa: ANN201
    return Gru(vocab_size, model_dim)


def not_one(vocab_size: int) -> Gru:
    return "a model"  # type: ignore[return-value]


def fails(vocab_size: int) -> Gru:
    raise OSError("no such file of weights")


NUMBER = 3


class Short(Gru):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, -1]


class Tupled(Gru):
    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x),)  # type: ignore[return-value]


class Seer(Gru):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1)).flip(1)


class Long(Gru):
    """Invalid: does not accept a single token."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, : x.shape[1] // 2 * 2]) if x.shape[1] > 1 else x.no_such_method()


class Deaf(Gru):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Running(Gru):
    def __init__(self, vocab_size: int, model_dim: int) -> None:
        super().__init__(vocab_size, model_dim)
        self.norm = nn.BatchNorm1d(vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x).transpose(1, 2)).transpose(1, 2)


class Frozen(Gru):
    def __init__(self, vocab_size: int, model_dim: int) -> None:
        super().__init__(vocab_size, model_dim)
        self.embedding.requires_grad_(False)


class Half(Gru):
    def __init__(self, vocab_size: int, model_dim: int) -> None:
        super().__init__(vocab_size, model_dim)
        self.half()


class Empty(nn.Module):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(*x.shape, 8, requires_grad=True)

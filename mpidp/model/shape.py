"""The shapes of models: everything that decides the parameters' names, sizes and cost. Pure, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias


@dataclass(frozen=True)
class TransformerShape:
    """Everything that decides the parameters' names and shapes."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    model_dim: int
    hidden_dim: int  # of the SwiGLU
    seq_len: int
    dropout: float = 0.0
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    head_size: int = 0  # 0: model_dim / num_heads
    rope_scaling: str = ""  # as rope_scaling() reads it

    @property
    def head_dim(self) -> int:
        return self.head_size or self.model_dim // self.num_heads


class RopeScaling(NamedTuple):
    """Of Llama 3.1: slow rotations are slower by `factor`, fast ones stay, between them it goes over."""

    factor: float
    low: float  # wavelengths above original / low are slow
    high: float  # those below original / high are fast
    original: float  # positions of the training before


def rope_scaling(text: str) -> RopeScaling | None:
    """Of "llama3:FACTOR,LOW,HIGH,ORIGINAL"; None of "". ValueError. Pure."""
    if not text:
        return None
    kind, _, numbers = text.partition(":")
    found = RopeScaling(*map(float, numbers.split(","))) if kind == "llama3" and numbers.count(",") == 3 else None
    if found is None or not found.factor >= 1 or not 0 < found.low < found.high or not found.original >= 1:
        raise ValueError(f"{text!r} must be llama3:FACTOR,LOW,HIGH,ORIGINAL, as in llama3:8,1,4,8192")
    return found


@dataclass(frozen=True)
class LSTMShape:
    """Of the LSTM language model (lstm.py)."""

    vocab_size: int
    num_layers: int
    model_dim: int
    seq_len: int
    dropout: float = 0.0
    tie_embeddings: bool = False
    head_dim: ClassVar[int] = 1  # it has none to cut

    def sizes(self) -> dict[str, tuple[int, ...]]:
        d = self.model_dim
        cell = {"weight_ih_l0": (4 * d, d), "weight_hh_l0": (4 * d, d), "bias_ih_l0": (4 * d,), "bias_hh_l0": (4 * d,)}
        found: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocab_size, d)}
        found |= {f"layers.{layer}.{name}": size for layer in range(self.num_layers) for name, size in cell.items()}
        return found if self.tie_embeddings else found | {"head.weight": (self.vocab_size, d)}

    def flops_per_token(self) -> float:
        """6 N of the matrices: every one is a product a token, forward and twice backward."""
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.model_dim
        return 6.0 * (num_parameters(self) - embedding)


@dataclass(frozen=True)
class OwnShape:
    """Of a user's own model (own.py), which is known by having been made once."""

    vocab_size: int
    seq_len: int
    factory: str  # module:factory
    arguments: Mapping[str, Any]  # with which that is called
    parameters: Sequence[tuple[str, Sequence[int]]]  # name and size of each
    tie_embeddings: ClassVar[bool] = False  # if it does, its parameters are named once
    head_dim: ClassVar[int] = 1
    dropout: ClassVar[float] = 1.0  # what its forward draws is not known: every micro-batch has its key

    @property
    def num_layers(self) -> int:
        """Of which each begins a block of the norm: at most so many."""
        return len(self.parameters)

    def sizes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(size) for name, size in self.parameters}

    def flops_per_token(self) -> float:
        """6 N of the matrices, as if each were a product a token: an estimate, since what forward does is not known."""
        return 6.0 * sum(math.prod(size) for _, size in self.parameters if len(size) >= 2)


Shape: TypeAlias = TransformerShape | LSTMShape | OwnShape


def default_hidden_dim(model_dim: int) -> int:
    """8/3 of the width, which gives SwiGLU the parameters of a 4x MLP, rounded up to a multiple of 64."""
    return -(-(8 * model_dim) // (3 * 64)) * 64


def num_parameters(shape: Shape) -> int:
    """Counted without a model: on torch's meta device, initialisation would import torch._dynamo."""
    if not isinstance(shape, TransformerShape):
        return sum(math.prod(size) for size in shape.sizes().values())
    d, heads = shape.model_dim, 2 * shape.num_heads + 2 * shape.num_kv_heads
    block = d * heads * shape.head_dim + 3 * d * shape.hidden_dim + 2 * d
    return shape.num_layers * block + d + shape.vocab_size * d * (1 if shape.tie_embeddings else 2)


def flops_per_token(shape: Shape, parameters: int) -> float:
    """Forward and backward floating-point operations a token: 6 N + 12 layers T H E (Chowdhery 2022, appendix B)."""
    if not isinstance(shape, TransformerShape):
        return shape.flops_per_token()
    width = shape.num_heads * shape.head_dim
    embedding = 0 if shape.tie_embeddings else shape.vocab_size * shape.model_dim
    return 6.0 * (parameters - embedding) + 12.0 * shape.num_layers * shape.seq_len * width


def shapes_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Of every parameter of the whole model, by name. Pure."""
    if not isinstance(shape, TransformerShape):
        return shape.sizes()
    d, h, heads, kv = shape.model_dim, shape.hidden_dim, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    block = {
        "attention_norm": (d,), "attention.q": (heads, d), "attention.k": (kv, d), "attention.v": (kv, d),
        "attention.o": (d, heads), "feed_forward_norm": (d,),
        "feed_forward.gate": (h, d), "feed_forward.up": (h, d), "feed_forward.down": (d, h),
    }
    found: dict[str, tuple[int, ...]] = {"embedding.weight": (shape.vocab_size, d), "norm.weight": (d,)}
    found |= {f"blocks.{layer}.{name}.weight": size for layer in range(shape.num_layers) for name, size in block.items()}
    return found if shape.tie_embeddings else found | {"head.weight": (shape.vocab_size, d)}

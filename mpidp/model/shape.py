"""Model shapes: the settings that determine the names, sizes and cost of parameters. Pure, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias


@dataclass(frozen=True)
class TransformerShape:
    """The shape of the Transformer (transformer.py)."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    model_dim: int
    hidden_dim: int  # width of SwiGLU
    seq_len: int
    dropout: float = 0.0
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    head_size: int = 0  # 0: model_dim / num_heads
    rope_scaling: str = ""  # parsed by rope_scaling()

    @property
    def head_dim(self) -> int:
        return self.head_size or self.model_dim // self.num_heads


class RopeScaling(NamedTuple):
    """Rotary scaling of Llama 3.1: low frequencies are divided by `factor`, high ones are kept, others interpolated."""

    factor: float
    low: float  # low frequencies: wavelengths above original / low
    high: float  # high frequencies: wavelengths below original / high
    original: float  # context length of the original training


def rope_scaling(text: str) -> RopeScaling | None:
    """Parse "llama3:FACTOR,LOW,HIGH,ORIGINAL". Returns None for "". Raises ValueError if the text is invalid. Pure."""
    if not text:
        return None
    kind, _, numbers = text.partition(":")
    found = RopeScaling(*map(float, numbers.split(","))) if kind == "llama3" and numbers.count(",") == 3 else None
    fits = found is not None and found.factor >= 1 and 0 < found.low < found.high and found.original >= 1
    if found is None or not fits or not all(map(math.isfinite, found)):
        raise ValueError(f"{text!r} must be llama3:FACTOR,LOW,HIGH,ORIGINAL, for example llama3:8,1,4,8192")
    return found


@dataclass(frozen=True)
class LSTMShape:
    """The shape of the LSTM language model (lstm.py)."""

    vocab_size: int
    num_layers: int
    model_dim: int
    seq_len: int
    dropout: float = 0.0
    tie_embeddings: bool = False
    head_dim: ClassVar[int] = 1  # an LSTM has no heads

    def sizes(self) -> dict[str, tuple[int, ...]]:
        d = self.model_dim
        cell = {"weight_ih_l0": (4 * d, d), "weight_hh_l0": (4 * d, d), "bias_ih_l0": (4 * d,), "bias_hh_l0": (4 * d,)}
        found: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocab_size, d)}
        found |= {f"layers.{layer}.{name}": size for layer in range(self.num_layers) for name, size in cell.items()}
        return found if self.tie_embeddings else found | {"head.weight": (self.vocab_size, d)}

    def flops_per_token(self) -> float:
        """Return 6 N for N matrix elements. Each element is used in one forward and two backward products per token."""
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.model_dim
        return 6.0 * (num_parameters(self) - embedding)


@dataclass(frozen=True)
class CustomShape:
    """The shape of a custom model (own.py), found by making the model once."""

    vocab_size: int
    seq_len: int
    factory: str  # module:factory
    arguments: Mapping[str, Any]  # the factory's arguments
    parameters: Sequence[tuple[str, Sequence[int]]]  # name and shape of each parameter
    tie_embeddings: ClassVar[bool] = False  # `parameters` has tied parameters only once
    head_dim: ClassVar[int] = 1
    dropout: ClassVar[float] = 1.0  # forward may draw random numbers, so each micro-batch gets a key

    @property
    def num_layers(self) -> int:
        """An upper bound on the number of layers, which is unknown: the number of parameter tensors."""
        return len(self.parameters)

    def sizes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(size) for name, size in self.parameters}

    def flops_per_token(self) -> float:
        """Return 6 N, where N is the number of matrix elements. This estimate assumes one product per matrix and token."""
        return 6.0 * sum(math.prod(size) for _, size in self.parameters if len(size) >= 2)


Shape: TypeAlias = TransformerShape | LSTMShape | CustomShape


def default_hidden_dim(model_dim: int) -> int:
    """Return 8/3 model_dim, rounded up to a multiple of 64. SwiGLU then has about as many parameters as a 4x MLP."""
    return -(-(8 * model_dim) // (3 * 64)) * 64


def num_parameters(shape: Shape) -> int:
    """Return the number of parameters, computed by formula. Making the model on the meta device would import torch._dynamo."""
    if not isinstance(shape, TransformerShape):
        return sum(math.prod(size) for size in shape.sizes().values())
    d, heads = shape.model_dim, 2 * shape.num_heads + 2 * shape.num_kv_heads
    block = d * heads * shape.head_dim + 3 * d * shape.hidden_dim + 2 * d
    return shape.num_layers * block + d + shape.vocab_size * d * (1 if shape.tie_embeddings else 2)


def flops_per_token(shape: Shape, parameters: int) -> float:
    """Return floating-point operations per token, forward and backward: 6 N + 12 layers T H E (Chowdhery 2022, appendix B).

    N: parameters without an untied embedding; T: seq_len; H: heads; E: head size.
    """
    if not isinstance(shape, TransformerShape):
        return shape.flops_per_token()
    width = shape.num_heads * shape.head_dim
    embedding = 0 if shape.tie_embeddings else shape.vocab_size * shape.model_dim
    return 6.0 * (parameters - embedding) + 12.0 * shape.num_layers * shape.seq_len * width


def shapes_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of the whole model, by name. Pure."""
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

"""Model shapes. A shape has the settings that determine the cost of a model, and the names and sizes of its parameters. Pure,
without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from mpidp.model.options import TransformerOptions


@dataclass(frozen=True)
class TransformerShape(TransformerOptions):
    """The shape of the Transformer (transformer.py). Give the options of options.py as keyword arguments."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    model_dim: int
    hidden_dim: int  # width of the feed-forward layer
    seq_len: int
    dropout: float = 0.0
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    head_size: int = 0  # 0: model_dim / num_heads
    rope_scaling: str = ""  # see rope_scaling.py

    @property
    def head_dim(self) -> int:
        return self.head_size or self.model_dim // self.num_heads

    @property
    def table_rows(self) -> int:
        """The number of rows of the table of learned positions. It is 0 if there is no such table."""
        return 0 if self.positions != "learned" else self.position_rows or self.seq_len

    def attended(self, layer: int) -> int:
        """Return the largest number of positions that a position attends to in the layer `layer`. Pure."""
        return min(self.window_of(layer) or self.seq_len, self.seq_len)


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
        """Return the floating-point operations per token, 6 N. N counts all parameters except an embedding that is not tied to
        the head. Each counted parameter is used in one forward and two backward products per token."""
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.model_dim
        return 6.0 * (num_parameters(self) - embedding)


@dataclass(frozen=True)
class CustomShape:
    """The shape of a custom model (own.py)."""

    vocab_size: int
    seq_len: int
    factory: str  # module:factory
    arguments: Mapping[str, Any]  # the factory's arguments
    parameters: Sequence[tuple[str, Sequence[int]]]  # name and shape of each parameter
    tie_embeddings: ClassVar[bool] = False  # `parameters` contains tied parameters only once
    head_dim: ClassVar[int] = 1
    dropout: ClassVar[float] = 1.0  # forward may draw random numbers, so each micro-batch gets a dropout key

    @property
    def num_layers(self) -> int:
        """An upper bound on the unknown number of layers. It is the number of parameter tensors."""
        return len(self.parameters)

    def sizes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(size) for name, size in self.parameters}

    def flops_per_token(self) -> float:
        """Return the floating-point operations per token, 6 N. N is the number of elements of matrices. This estimate assumes
        that each matrix is used in one forward and two backward products per token."""
        return 6.0 * sum(math.prod(size) for _, size in self.parameters if len(size) >= 2)


Shape: TypeAlias = TransformerShape | LSTMShape | CustomShape


def default_hidden_dim(model_dim: int) -> int:
    """Return 8/3 model_dim, rounded up to a multiple of 64. With this width, SwiGLU has about as many parameters as an MLP
    without a gate that has the width 4 model_dim."""
    return -(-(8 * model_dim) // (3 * 64)) * 64


def num_parameters(shape: Shape) -> int:
    """Return the number of parameters, without making the model."""
    if not isinstance(shape, TransformerShape):
        return sum(math.prod(size) for size in shape.sizes().values())
    block, outside = (sum(map(math.prod, sizes.values())) for sizes in (block_sizes(shape), _outside_sizes(shape)))
    return shape.num_layers * block + outside


def flops_per_token(shape: Shape, parameters: int) -> float:
    """Return floating-point operations per token, forward and backward: 6 N + 12 H E A (Chowdhery 2022, appendix B).

    N: the number of parameters, without learned positions and without an embedding that is not tied to the head. H: number of
    heads. E: head size. A: the number of positions that a position attends to, summed over the layers. In one layer this is
    seq_len, or the sliding window if that is shorter. For an LSTM or a custom model, the result is shape.flops_per_token().
    parameters: the number of all parameters.
    """
    if not isinstance(shape, TransformerShape):
        return shape.flops_per_token()
    width = shape.num_heads * shape.head_dim
    tables = (0 if shape.tie_embeddings else shape.vocab_size) + shape.table_rows
    attended = sum(map(shape.attended, range(shape.num_layers))) if shape.window else shape.num_layers * shape.seq_len
    return 6.0 * (parameters - tables * shape.model_dim) + 12.0 * attended * width


def block_sizes(shape: TransformerShape) -> dict[str, tuple[int, ...]]:
    """Return {name in the block: shape} for the parameters of one block. Pure."""
    d, h, heads, kv = shape.model_dim, shape.hidden_dim, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    branches = {
        "attention": {"q": (heads, d), "k": (kv, d), "v": (kv, d), "o": (d, heads)},
        "feed_forward": ({"gate": (h, d)} if shape.gated else {}) | {"up": (h, d), "down": (d, h)},
    }
    biased, norms, parts = shape.biased(), shape.norms(), _norm_parts(shape)
    found: dict[str, tuple[int, ...]] = {}
    for branch, matrices in branches.items():
        found |= {f"{branch}_norm.{part}": (d,) for part in parts if f"{branch}_norm" in norms}
        found |= {f"{branch}.{name}.weight": size for name, size in matrices.items()}
        found |= {f"{branch}.{name}.bias": size[:1] for name, size in matrices.items() if name in biased}
        found |= {f"{branch}_out_norm.{part}": (d,) for part in parts if f"{branch}_out_norm" in norms}
    if shape.input_mix:
        found["input_mix.weight"] = (2,)
    if shape.qk_norm:
        widths = {"q": heads, "k": kv} if shape.qk_norm == "layer" else {"q": shape.head_dim, "k": shape.head_dim}
        found |= {f"attention.{name}_norm.weight": (width,) for name, width in widths.items()}
    return found


def _norm_parts(shape: TransformerShape) -> tuple[str, ...]:
    return ("weight", "bias") if shape.norm == "layer" else ("weight",)


def _outside_sizes(shape: TransformerShape) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} for the parameters outside the blocks."""
    d = shape.model_dim
    found: dict[str, tuple[int, ...]] = {"embedding.weight": (shape.vocab_size, d)}
    found |= {f"norm.{part}": (d,) for part in _norm_parts(shape)}
    if shape.table_rows:
        found["positions.weight"] = (shape.table_rows, d)
    return found if shape.tie_embeddings else found | {"head.weight": (shape.vocab_size, d)}


def shapes_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} for the parameters of the whole model. Pure."""
    if not isinstance(shape, TransformerShape):
        return shape.sizes()
    block, found = block_sizes(shape), _outside_sizes(shape)
    head = {"head.weight": found.pop("head.weight")} if "head.weight" in found else {}
    found |= {f"blocks.{layer}.{name}": size for layer in range(shape.num_layers) for name, size in block.items()}
    return found | head

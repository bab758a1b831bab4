"""Computes the memory of each rank of a mesh, by use, from the sizes of the model. Pure.

p is the number of parameters of a rank: those of the layers of its stage, with matrices divided by tp. w is the number of bytes
per number in matrix products. n = micro_batch x seq_len is the number of tokens of a micro-batch. f = min(M, pp - stage) is the
number of micro-batches whose forward is done and whose backward is not (1F1B, Narayanan 2021, section 2.2.1).

| use | bytes | divided by dp from |
|---|---|---|
| parameters | 4 p, float32 master weights | shard 3 |
| gradients | 4 p per slot | shard 2 |
| optimizer | 8 p, the moments of AdamW | shard 1 |
| working | 16 bits: a copy of the weights, 2 p; shard 2 and 3: gathered gradients and weights of two blocks | |
| activations | f n layers (W + S / tp), W = 24 D + 8 (16 bits: 26 D + 8), S = w (4 D + 4 F) + 4 H | |
| with recompute | f n layers 4 D, and the activations of one block as above | |
| logits | on the last stage 8 n V / tp (16 bits: 10 n V / tp), for logits, log-probabilities and gradients | |

W counts the activations of norms and residuals, which every tensor-parallel rank holds in full. S counts the activations between
matrices that are divided by tp. With mesh.sequence, W and the activations that recompute keeps are divided by tp. In 16 bits W is
then 20 D + 8, because an input that several products share is saved once. The formulas count the tensors that autograd saves in
mpidp.model.transformer (checked in tests/unit/test_mesh_formulas.py). Embedding and head are divided by tp along the vocabulary.
Layers are assigned to stages such that the slowest stage is as fast as possible. The last stage also computes the head.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

from mpidp.model.part import stage_layers
from mpidp.model.shape import TransformerShape

MASTER, MOMENTS = 4, 8  # bytes per parameter


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model from which its parameters, memory and operations follow."""

    num_layers: int
    model_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    seq_len: int
    tie_embeddings: bool = False

    @property
    def matrices(self) -> int:
        """The number of parameters of the matrices of a block."""
        kv_dim = self.model_dim // self.num_heads * self.num_kv_heads
        return self.model_dim * (2 * self.model_dim + 2 * kv_dim + 3 * self.hidden_dim)

    @property
    def block(self) -> int:
        """The number of parameters of a block."""
        return self.matrices + 2 * self.model_dim

    @property
    def table(self) -> int:
        """The number of parameters of the embedding. The head has the same number."""
        return self.vocab_size * self.model_dim

    @property
    def parameters(self) -> int:
        """The number of parameters of the model."""
        return self.num_layers * self.block + self.model_dim + self.table * (1 if self.tie_embeddings else 2)


@dataclass(frozen=True)
class Shape:
    """A mesh of dp replicas with pp stages of tp ranks. shard: the level of sharding over dp, 0 to 3."""

    dp: int
    pp: int
    tp: int
    shard: int = 0

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return self.dp * self.pp * self.tp

    def over_dp(self, level: int) -> int:
        """Return dp if the level of sharding is at least `level`, else 1."""
        return self.dp if self.shard >= level else 1

    def __str__(self) -> str:
        return f"dp {self.dp} x pp {self.pp} x tp {self.tp}" + (f", shard {self.shard}" if self.dp > 1 else "")


@dataclass(frozen=True)
class Work:
    """How the work of a step is divided, and the sizes of its numbers."""

    global_batch: int  # sequences
    micro_batch: int  # sequences
    recompute: float = 0.0  # fraction of the blocks that save only their inputs; mpidp.train supports 0 and 1
    number_bytes: int = 2  # bytes per number in matrix products: 2 for bfloat16, 4 for float32
    slots: int = 1  # number of gradient buffers
    fused: bool = True  # whether the attention kernel does not store the T x T scores
    wire_bytes: int = 4  # bytes per number in messages within tp and pp; mpidp.train sends float32
    sequence: bool = False  # mesh.sequence: whether norms and residuals are divided by tp

    def micro_batches(self, shape: Shape) -> int:
        """Return M, the number of micro-batches per replica."""
        return -(-self.global_batch // (self.micro_batch * shape.dp))


@dataclass(frozen=True)
class Memory:
    """The memory of one rank by use, in bytes."""

    parameters: float
    gradients: float
    optimizer: float
    working: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """The total memory in bytes."""
        return sum(getattr(self, part.name) for part in fields(self))


@lru_cache(maxsize=4096)
def _layers(model: ModelSizes, pp: int) -> list[int]:
    sizes = (model.vocab_size, model.num_layers, model.num_heads, model.num_kv_heads, model.model_dim, model.hidden_dim)
    return [len(layers) for layers in stage_layers(TransformerShape(*sizes, model.seq_len), pp)]


def layers_of(model: ModelSizes, shape: Shape, stage: int) -> int:
    """Return the number of blocks of a stage. The last stage has fewer, because it also computes the head. Pure."""
    return _layers(model, shape.pp)[stage]


def stages_of(model: ModelSizes, shape: Shape) -> set[int]:
    """Return the stages that can need the most memory or time: the first stage, the first stage with the most blocks, and the
    last stage. Pure."""
    layers = _layers(model, shape.pp)
    return {0, layers.index(max(layers)), shape.pp - 1}


def parameters_of(model: ModelSizes, shape: Shape, stage: int) -> float:
    """Return the number of parameters of each rank of a stage, before sharding over dp. Every tensor-parallel rank has all gains
    of norms. If embedding and head are tied, the first and the last stage both have the table. Pure."""
    first, last = stage == 0, stage == shape.pp - 1
    tables = first + last - (model.tie_embeddings and shape.pp == 1)
    cut = layers_of(model, shape, stage) * model.matrices + tables * model.table
    return cut / shape.tp + layers_of(model, shape, stage) * 2 * model.model_dim + last * model.model_dim


def kept_of_block(model: ModelSizes, shape: Shape, work: Work) -> float:
    """Return the bytes per token that one block saves for backward. Attention that is not fused also saves its scores, their
    dropout and the dropout mask, in 16 bits 5 bytes per score (Korthikanti 2022, section 4.1). Pure."""
    d, w = model.model_dim, work.number_bytes
    whole = ((24 if w == 4 else 26) * d + 8) if not work.sequence else ((24 if w == 4 else 20) * d + 8) / shape.tp
    scores = 0 if work.fused else (2 * w + 1) * model.num_heads * model.seq_len
    return whole + (w * (4 * d + 4 * model.hidden_dim) + 4 * model.num_heads + scores) / shape.tp


def logits_bytes(model: ModelSizes, shape: Shape, number_bytes: int) -> float:
    """Return the bytes of logits per token. Pure."""
    return (8 if number_bytes == 4 else 10) * model.vocab_size / shape.tp


def memory_of(model: ModelSizes, shape: Shape, work: Work, stage: int) -> Memory:
    """Return the memory of each rank of this stage. Pure."""
    p, small = parameters_of(model, shape, stage), work.number_bytes == 2
    tokens, last = work.micro_batch * model.seq_len, stage == shape.pp - 1
    working = 0.0
    largest = max(model.block, model.table) / shape.tp  # the most parameters that are gathered at a time
    if shape.shard >= 3 and shape.dp > 1:
        working += min(p, 2 * largest) * work.number_bytes
    elif small:
        working += 2 * p
    if shape.shard >= 2 and shape.dp > 1:
        working += min(p, 2 * largest) * MASTER
    in_flight = min(work.micro_batches(shape), shape.pp - stage)
    block, layers = kept_of_block(model, shape, work), layers_of(model, shape, stage)
    share = shape.tp if work.sequence else 1
    entry = 4 * model.model_dim / share
    kept = in_flight * layers * (work.recompute * entry + (1 - work.recompute) * block) + (work.recompute > 0) * block
    final_norm = last * (12 if work.number_bytes == 4 else 10) * model.model_dim / share
    return Memory(
        MASTER * p / shape.over_dp(3), MASTER * work.slots * p / shape.over_dp(2), MOMENTS * p / shape.over_dp(1), working,
        tokens * (kept + final_norm), tokens * logits_bytes(model, shape, work.number_bytes) * last,
    )


def largest(model: ModelSizes, shape: Shape, work: Work) -> Memory:
    """Return the memory of the stage that needs the most memory. This is one of the first stages, which have the most
    micro-batches in flight, or the last stage, which has the logits. Pure."""
    return max((memory_of(model, shape, work, stage) for stage in stages_of(model, shape)), key=lambda one: one.total)

"""Computes the memory that each rank of a mesh needs for each use, from the sizes of the model. Pure.

p is the number of parameters of a rank, and q is the number of its trained parameters. With LoRA, only the adapters are
trained. The rank has the parameters of its stage, and 1 / tp of each matrix. w is the number of bytes per number in matrix
products. n = micro_batch x seq_len is the number of tokens of a micro-batch. M is the number of micro-batches per replica.
f = min(M, pp - stage) is the largest number of micro-batches that have finished their forward pass but not their backward pass
(1F1B, Narayanan 2021, section 2.2.1).

| use | bytes | divided by dp with |
|---|---|---|
| parameters | 4 p, float32 master weights | mesh.shard=3 |
| gradients | 4 q per slot | mesh.shard=2 or 3 |
| optimizer | 8 q, the moments of AdamW | mesh.shard=1, 2 or 3 |
| working | 16 bits: a copy of the weights, 2 p; shard 2 and 3: gathered gradients and weights of two blocks | |
| activations | f n layers (W + S / tp), by default W = 24 D + 8 (16 bits: 26 D + 8), S = w (4 D + 4 F) + 4 H | |
| with recompute | f n layers 4 D, and the activations of one block as above | |
| logits | on the last stage 12 n V / tp, for log-probabilities and two gradients | |
| logits, if in chunks | g + max(g, 4 r V / tp), 16 bits: g + max(g, 6 r V / tp), where g = 4 n D + 4 V D / tp | |

D is model_dim, F is hidden_dim, H is the number of heads, and V is the vocabulary size. W counts the activations of norms and
residuals, which every tensor-parallel rank holds in full. S counts the activations that tensor parallelism divides. With
mesh.sequence, W and the activations that recompute keeps are divided by tp. In 16 bits W is then 20 D + 8, because an input
that several products share is saved once. activations.py computes W and S for all options of the Transformer. With
train.loss=auto, the loss is computed in chunks of r tokens if the logits are large (model/loss_chunks.py). With LoRA, g is
4 n D, and W and S are upper bounds, because they are computed as if all parameters were trained. Embedding and head are divided
by tp along the vocabulary. The last stage also computes the head. Layers are assigned to stages so that the slowest stage is as
fast as possible.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

from mpidp.model.part import stage_layers
from mpidp.plan.mesh.activations import kept_of_block, kept_of_last_norm, loss_bytes
from mpidp.plan.mesh.sizes import ModelSizes, Shape, Work

MASTER, MOMENTS = 4, 8  # bytes per parameter


@dataclass(frozen=True)
class Memory:
    """The memory that one rank needs for each use, in bytes."""

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
    return [len(layers) for layers in stage_layers(model.shape, pp)]


def layers_of(model: ModelSizes, shape: Shape, stage: int) -> int:
    """Return the number of blocks of stage `stage`. The last stage may have fewer blocks than others, because it also computes
    the head. Pure."""
    return _layers(model, shape.pp)[stage]


def stages_of(model: ModelSizes, shape: Shape) -> set[int]:
    """Return the stages that can need the most memory or time: the first stage, the first stage with the most blocks, and the
    last stage. Pure."""
    layers = _layers(model, shape.pp)
    return {0, layers.index(max(layers)), shape.pp - 1}


def parameters_of(model: ModelSizes, shape: Shape, stage: int) -> float:
    """Return the number of parameters of each rank of stage `stage`, before sharding over dp. Tensor parallelism divides the
    matrices, but not the norms or the learned positions. If embedding and head are tied and pp is above 1, the first and the last
    stage both have the embedding. Pure."""
    first, last = stage == 0, stage == shape.pp - 1
    tables = first + last - (model.tie_embeddings and shape.pp == 1)
    cut = layers_of(model, shape, stage) * model.matrices + tables * model.table
    in_full = layers_of(model, shape, stage) * (model.block - model.matrices)
    return cut / shape.tp + in_full + last * model.norm + first * model.positions + _adapters_of(model, shape, stage)


def trained_of(model: ModelSizes, shape: Shape, stage: int) -> float:
    """Return the number of trained parameters of each rank of stage `stage`. With LoRA, these are the adapters. Pure."""
    return _adapters_of(model, shape, stage) if model.lora_rank else parameters_of(model, shape, stage)


def _adapters_of(model: ModelSizes, shape: Shape, stage: int) -> float:
    return layers_of(model, shape, stage) * model.adapters_per_rank(shape.tp)


def memory_of(model: ModelSizes, shape: Shape, work: Work, stage: int) -> Memory:
    """Return the memory of each rank of stage `stage`. Pure."""
    p, q, small = parameters_of(model, shape, stage), trained_of(model, shape, stage), work.number_bytes == 2
    tokens, last = work.micro_batch * model.seq_len, stage == shape.pp - 1
    working = 0.0
    largest = max(model.block, model.table) / shape.tp  # largest number of parameters that are gathered at a time
    if shape.shard >= 3 and shape.dp > 1:
        working += min(p, 2 * largest) * work.number_bytes
    elif small:
        working += 2 * p
    if shape.shard >= 2 and shape.dp > 1:
        working += min(q, 2 * largest) * MASTER
    in_flight = min(work.micro_batches(shape), shape.pp - stage)
    block, layers = kept_of_block(model, shape, work), layers_of(model, shape, stage)
    share = shape.tp if work.sequence else 1
    entry = 4 * model.model_dim / share
    kept = in_flight * layers * (work.recompute * entry + (1 - work.recompute) * block) + (work.recompute > 0) * block
    final_norm = last * kept_of_last_norm(model, work.number_bytes) / share
    return Memory(
        MASTER * p / shape.over_dp(3), MASTER * work.slots * q / shape.over_dp(2), MOMENTS * q / shape.over_dp(1), working,
        tokens * (kept + final_norm), last * loss_bytes(model, shape, work),
    )


def largest(model: ModelSizes, shape: Shape, work: Work) -> Memory:
    """Return the memory of each rank of the stage that needs the most memory. Pure."""
    return max((memory_of(model, shape, work, stage) for stage in stages_of(model, shape)), key=lambda one: one.total)

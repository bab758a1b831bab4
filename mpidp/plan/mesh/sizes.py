"""The sizes of a model, of a mesh and of the work of a step, from which memory and time are computed. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from mpidp.data.lanes import Lanes
from mpidp.model.adapter_sizes import adapter_sizes
from mpidp.model.options import TransformerOptions
from mpidp.model.part import part_of
from mpidp.model.shape import TransformerShape, block_sizes, num_parameters
from mpidp.plan.ranks.predict import most_micro_batches


@dataclass(frozen=True)
class ModelSizes:
    """The sizes and options of a Transformer, which determine its parameters, memory and operations."""

    num_layers: int
    model_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    seq_len: int
    tie_embeddings: bool = False
    head_size: int = 0  # 0: model_dim / num_heads
    options: TransformerOptions = TransformerOptions()
    lora_rank: int = 0  # model.lora_rank; 0: all parameters are trained
    lora_targets: str = ""  # model.lora_targets

    def plain(self) -> dict[str, Any]:
        """Return the sizes as plain values for JSON. Options are included only if they differ from LLaMA's, and adapters only
        if there are any."""
        own = {"lora_rank", "lora_targets"} if self.lora_rank else set()
        others = {"head_size", "options", "lora_rank", "lora_targets"} - own
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in others}
        return found | ({"head_dim": self.head_size} if self.head_size else {}) | self.shape.changed()

    @cached_property
    def shape(self) -> TransformerShape:
        """The sizes and options as a TransformerShape."""
        sizes = (self.vocab_size, self.num_layers, self.num_heads, self.num_kv_heads, self.model_dim, self.hidden_dim)
        return TransformerShape(
            *sizes, self.seq_len, tie_embeddings=self.tie_embeddings, head_size=self.head_size, **vars(self.options)
        )

    @cached_property
    def replicated(self) -> dict[str, int]:
        """{name: number of elements} of those parameters in a block that every tensor-parallel rank holds in full."""
        cut = part_of(self.shape, stage=0, stages=1, index=0, size=2)
        return {name: math.prod(size) for name, size in block_sizes(self.shape).items() if not cut.is_cut(f"blocks.0.{name}")}

    @cached_property
    def matrices(self) -> int:
        """The number of elements in those parameters of a block that tensor parallelism divides: the matrices and some biases."""
        return self.block - sum(self.replicated.values())

    @cached_property
    def block(self) -> int:
        """The number of parameters of a block."""
        return sum(map(math.prod, block_sizes(self.shape).values()))

    @cached_property
    def adapters(self) -> dict[str, int]:
        """{name: number of elements} of the parameters of the adapters in a block."""
        block = {f"blocks.0.{name}": size for name, size in block_sizes(self.shape).items()}
        found = adapter_sizes(block, self.lora_rank, self.lora_targets) if self.lora_rank else {}
        return {name: math.prod(size) for name, size in found.items()}

    @cached_property
    def whole_adapters(self) -> dict[str, int]:
        """The parameters in `adapters` that every tensor-parallel rank holds in full."""
        cut = part_of(self.shape, stage=0, stages=1, index=0, size=2)
        return {name: n for name, n in self.adapters.items() if not cut.is_cut(name)}

    def adapters_per_rank(self, tp: int) -> float:
        """Return the number of elements of a block's adapters on each of `tp` ranks. Pure."""
        whole = sum(self.whole_adapters.values())
        return whole + (sum(self.adapters.values()) - whole) / tp

    @cached_property
    def attended(self) -> float:
        """The mean over the layers of the number of positions that a position attends to. In a layer this number is seq_len, or
        the length of the attention window if that is shorter."""
        return sum(map(self.shape.attended, range(self.num_layers))) / self.num_layers

    @property
    def norm(self) -> int:
        """The number of parameters of the last norm."""
        return self.model_dim * (2 if self.options.norm == "layer" else 1)

    @property
    def positions(self) -> int:
        """The number of parameters of the table of learned positions, or 0 if the model has none."""
        return self.shape.table_rows * self.model_dim

    @property
    def table(self) -> int:
        """The number of parameters of the embedding. The head has the same number of parameters."""
        return self.vocab_size * self.model_dim

    @property
    def parameters(self) -> int:
        """The number of parameters of the model."""
        return num_parameters(self.shape)

    @property
    def trained(self) -> int:
        """The number of trained parameters. With LoRA, these are the adapters."""
        return self.num_layers * sum(self.adapters.values()) if self.lora_rank else self.parameters


@dataclass(frozen=True)
class Shape:
    """A mesh of dp replicas with pp stages of tp ranks. shard: the level of sharding over dp, 0 to 3."""

    dp: int
    pp: int
    tp: int
    shard: int = 0

    @property
    def ranks(self) -> int:
        """The number of ranks of the mesh."""
        return self.dp * self.pp * self.tp

    def over_dp(self, level: int) -> int:
        """Return the number of ranks among which the state of sharding level `level` is divided: dp if `shard` is at least
        `level`, else 1. Pure."""
        return self.dp if self.shard >= level else 1

    def __str__(self) -> str:
        return f"dp {self.dp} x pp {self.pp} x tp {self.tp}" + (f", shard {self.shard}" if self.dp > 1 else "")


@dataclass(frozen=True)
class Work:
    """How a step is computed: its batch sizes, bytes per number, and options such as recomputation."""

    global_batch: int  # sequences
    micro_batch: int  # sequences
    recompute: float = 0.0  # fraction of the blocks that save only their inputs; mpidp.train supports 0 and 1
    number_bytes: int = 2  # bytes per number in matrix products: 2 for bfloat16, 4 for float32
    slots: int = 0  # number of gradient buffers; 0: as many as comm.reducer=tree needs
    fused: bool = True  # whether the attention kernel does not store the T x T scores
    wire_bytes: int = 4  # bytes per number in messages within tp and pp; mpidp.train sends float32
    sequence: bool = False  # mesh.sequence: whether norms and residuals are divided by tp
    loss: str = "auto"  # train.loss: whether the loss is computed in chunks
    slices: int = 1  # model.slices: number of slices of each layer
    lanes: int = 0  # smallest number of lanes (sequences of micro-batches); every replica has at least one lane
    fsdp: bool = False  # whether sharding and overlap are those of PyTorch's FSDP, instead of those of mpidp.train

    def cut(self, dp: int) -> Lanes:
        """Return the lanes of a step on `dp` replicas. Pure."""
        return Lanes(self.global_batch, self.micro_batch, min(-(-self.global_batch // self.micro_batch), max(self.lanes, dp)))

    def micro_batches(self, shape: Shape) -> int:
        """Return M, the number of micro-batches of the replica that has the most micro-batches in a step. Pure."""
        if self.lanes > shape.dp and shape.shard < 2:
            return most_micro_batches(self.cut(shape.dp), shape.dp)
        return -(-self.global_batch // (self.micro_batch * shape.dp))

"""Determines which part of the Transformer a rank holds. Pure.

With pipeline parallelism, a rank has some of the layers. With tensor parallelism (Shoeybi 2019, Megatron-LM, section 3), it
has some attention heads and some feed-forward channels of each layer, and some rows of the embedding and of the head. The
weights and biases of the layers q, k, v, gate and up are split by rows. The weights of the layers o and down are split by
columns, so the outputs of a residual branch (attention or feed-forward) are summed over the ranks. The biases of these two
layers are replicated, and are added after this sum. Embedding and head are split by rows. Learned positions and norms are
replicated, but the norms over all heads together (model.qk_norm=layer) are split by heads. Between residual branches, a rank has
the hidden states of all positions. With sequence parallelism, it has only the hidden states of its own positions (Korthikanti
2022, section 4.2.2).

A LoRA adapter adds B A to a weight (lora.py). If the weight is split by rows, B is split by rows and A is replicated. If the
weight is split by columns, A is split by columns and B is replicated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpidp.errors import UsageError
from mpidp.model.shape import Shape, TransformerShape

TABLES = ("embedding", "positions")  # parameters of the first stage
ROWS = ("embedding", "head", "q", "k", "v", "gate", "up")  # layers whose weight and bias are split by rows
COLUMNS = tuple(f"{layer}.{part}" for layer in ("attention.o", "feed_forward.down") for part in ("weight", "lora_a"))
HEAD_NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True)
class Part:
    """The part of a model on one rank: some of the layers, and an index range of each parameter that is split."""

    chunks: tuple[range, ...]  # layers of each chunk, a group of consecutive layers; there are mesh.interleave chunks
    has_embedding: bool = True  # whether this is the first stage
    has_head: bool = True  # whether this is the last stage, with the last norm and the head
    index: int = 0  # index of the rank among the tensor-parallel ranks
    size: int = 1  # number of tensor-parallel ranks
    tied: bool = False  # whether embedding and head share one tensor
    head_dim: int = 1  # size of an attention head
    sequence: bool = False  # whether positions are split over the ranks between residual branches (sequence parallelism)
    norms_all_heads: bool = False  # whether the norms of queries and keys are over all heads together

    @property
    def layers(self) -> list[int]:
        return [layer for chunk in self.chunks for layer in chunk]

    def chunk_of(self, name: str) -> int:
        """Return the index of the chunk that contains the parameter `name`. Pure."""
        names = name.split(".")
        if names[0] == "blocks":
            return next(i for i, layers in enumerate(self.chunks) if int(names[1]) in layers)
        return 0 if names[0] in TABLES else len(self.chunks) - 1

    def own_range(self, count: int) -> range:
        """Divide `count` rows, channels or heads among the tensor-parallel ranks as evenly as possible. Return this rank's
        index range. Pure."""
        return range(self.index * count // self.size, (self.index + 1) * count // self.size)

    def positions(self, count: int) -> range:
        """Return the positions whose hidden states this rank has between residual branches. count: number of positions of a
        sequence. Pure."""
        return self.own_range(count) if self.sequence else range(count)

    def global_name(self, name: str) -> str:
        """Return the name that this rank's parameter `name` has in the whole model. For a tied head, this is
        "embedding.weight". Otherwise it is `name`. Pure."""
        return "embedding.weight" if self.tied and name == "head.weight" else name

    def box(self, name: str, size: tuple[int, ...]) -> tuple[slice, ...]:
        """Return the rectangular block of a parameter that this rank has, as one slice per dimension. name, size: the
        parameter's name and shape in the whole model. Pure."""
        dim, found = self._dim(name), [slice(0, length) for length in size]
        if dim is not None:
            unit = self.head_dim if ".attention." in name else 1  # heads are never split
            units = self.own_range(size[dim] // unit)
            found[dim] = slice(units.start * unit, units.stop * unit)
        return tuple(found)

    def slices(self, name: str, size: tuple[int, ...], count: int) -> tuple[int, list[int]] | None:
        """Return (the dimension in which a parameter is split, the lengths of this rank's slices in it). A slice is one of the
        `count` sections into which model.slices divides each layer. If each rank has the whole parameter, return None. name,
        size: see box(). Pure."""
        if (dim := self._dim(name)) is None:
            return None
        mine = range(self.index * count // self.size, (self.index + 1) * count // self.size)
        boxes = [replace(self, index=i, size=count).box(name, size)[dim] for i in mine]
        return dim, [one.stop - one.start for one in boxes]

    def _dim(self, name: str) -> int | None:
        """Return the dimension in which a parameter is split. If each rank has the whole parameter, return None."""
        layer = name.rpartition(".")[0].rpartition(".")[2]
        if name.endswith(COLUMNS):
            return 1
        rows = layer in ROWS and not name.endswith(".lora_a")
        return 0 if rows or (self.norms_all_heads and layer in HEAD_NORMS) else None

    def has(self, name: str) -> bool:
        """Return whether this rank has a parameter, or some rows or columns of it. name: the parameter's name in the whole
        model. Pure."""
        names = name.split(".")
        if names[0] == "blocks":
            return int(names[1]) in self.layers
        if names[0] == "positions":
            return self.has_embedding
        return self.has_head and (names[0] != "embedding" or self.tied) or names[0] == "embedding" and self.has_embedding

    def sizes(self, whole: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of this rank's parameters, by name. whole: the shapes in the whole model. Pure."""
        return {name: tuple(s.stop - s.start for s in self.box(name, size)) for name, size in whole.items() if self.has(name)}

    def is_cut(self, name: str) -> bool:
        """Return whether the parameter `name` is split over the tensor-parallel ranks. Pure."""
        return self.size > 1 and self._dim(name) is not None


def whole(shape: Shape) -> Part:
    """Return the whole model as a `Part` object. Pure."""
    return Part((range(shape.num_layers),), tied=shape.tie_embeddings, head_dim=shape.head_dim)


def part_of(shape: Shape, stage: int, stages: int, index: int, size: int, sequence: bool = False, chunks: int = 1) -> Part:
    """Return the part of the model on one rank. stage: the rank's pipeline stage, from 0. stages: number of stages. index: the
    rank's tensor-parallel index, from 0. size: number of tensor-parallel ranks.

    sequence: whether to use sequence parallelism. chunks: number of chunks (groups of consecutive layers) per stage
    (mesh.interleave). Pure.
    """
    runs = tuple(stage_layers(shape, stages * chunks)[stage::stages])
    together = isinstance(shape, TransformerShape) and shape.qk_norm == "layer"
    return Part(runs, stage == 0, stage == stages - 1, index, size, shape.tie_embeddings, shape.head_dim, sequence, together)


def stage_layers(shape: Shape, stages: int) -> list[range]:
    """Return the layers of each stage. A stage has at least one layer, and its layers are consecutive. The division makes the
    slowest stage as fast as possible.

    The time of a stage is estimated by its floating-point operations per token, including those of the head. If only some layers
    have sliding windows, the mean time over all layers is used for every layer. Pure.
    """
    if not isinstance(shape, TransformerShape) or stages == 1:
        return [range(shape.num_layers)]
    d, count = shape.model_dim, shape.num_layers
    heads = 2 * shape.num_heads + 2 * shape.num_kv_heads
    attended = sum(map(shape.attended, range(count))) / count  # mean number of positions that a position attends to
    block = d * heads * shape.head_dim + (2 + shape.gated) * d * shape.hidden_dim
    block += int(2 * attended * shape.num_heads * shape.head_dim)
    head = shape.vocab_size * d

    def slowest(last: int) -> int:
        return max(last * block + head, -(-(count - last) // (stages - 1)) * block)

    rest = count - min(range(1, count - stages + 2), key=slowest)
    bounds = [i * rest // (stages - 1) for i in range(stages)]
    return [*(range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)), range(rest, count)]


def check_split(shape: Shape, tp: int, pp: int, chunks: int = 1) -> None:
    """Raise UsageError if the model cannot be split over tp x pp ranks with `chunks` groups of consecutive layers per stage.
    The message suggests the nearest possible values. Pure."""
    if not isinstance(shape, TransformerShape):
        if tp * pp > 1:
            raise UsageError(f"tp={tp}, pp={pp}: only model.kind=transformer can be split over ranks. Use tp=1 and pp=1")
        return
    if pp > 1 and shape.input_mix:
        raise UsageError(f"pp={pp}: a model with model.input_mix cannot be split into stages, because each layer needs the "
                         "output of the embedding, and only the first stage has the embedding. Use pp=1")
    heads = shape.num_kv_heads
    if heads % tp:
        fit = [n for n in range(1, heads + 1) if heads % n == 0]
        near = sorted({max(n for n in fit if n <= tp), min([n for n in fit if n >= tp], default=heads)})
        raise UsageError(f"mesh.tp={tp} does not divide the model's {heads} key-value heads, and a head cannot be split. Use "
                         f"mesh.tp={' or '.join(map(str, near))}")
    if pp > shape.num_layers:
        raise UsageError(f"mesh.pp={pp}: each stage needs at least one layer, but the model has only {shape.num_layers}. Use at "
                         f"most mesh.pp={shape.num_layers}")
    if pp * chunks > shape.num_layers:
        raise UsageError(f"mesh.pp={pp} x mesh.interleave={chunks}: each of these {pp * chunks} groups of layers needs at "
                         f"least one layer, but the model has only {shape.num_layers}. Use at most "
                         f"mesh.interleave={shape.num_layers // pp}")


def check_slices(shape: Shape, slices: int, tp: int) -> None:
    """Raise UsageError if the layers of a model cannot be divided into `slices` slices (model.slices), or if `slices` is not a
    multiple of the number `tp` of tensor-parallel ranks. Pure."""
    if slices == 1 or not isinstance(shape, TransformerShape):
        return
    if slices % tp:
        raise UsageError(f"mesh.tp={tp} does not divide model.slices={slices}, so ranks would have different numbers of slices. "
                         f"Use mesh.tp={' or '.join(str(2**k) for k in range(slices.bit_length()))}")
    for what, count in (("num_heads", shape.num_heads), ("num_kv_heads", shape.num_kv_heads), ("hidden_dim", shape.hidden_dim)):
        if count % slices:
            fit = max(2**k for k in range(slices.bit_length()) if count % 2**k == 0)
            raise UsageError(f"model.slices={slices} does not divide model.{what}={count}. Use model.slices={fit}, or another "
                             f"model.{what}")
    if shape.vocab_size < slices:
        raise UsageError(f"model.slices={slices} exceeds the vocabulary of {shape.vocab_size} tokens. Use fewer slices")

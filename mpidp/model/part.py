"""Which part of the Transformer a rank has: some of its layers (pipeline), and of each some heads, hidden channels and rows of
the vocabulary (tensor parallelism: Shoeybi 2019, Megatron-LM, section 3). Pure.

What is cut is cut where the cut costs least: query, key, value, gate and up by rows, what follows them (o, down) by columns, so
that one sum over the ranks a branch makes it whole. Embedding and head are cut by vocabulary. Norms are whole on every rank;
between branches a rank has all positions of a sequence, or its share of them (sequence parallelism: Korthikanti 2022, section
4.2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from mpidp.errors import UsageError
from mpidp.model.shape import Shape, TransformerShape

ROWS = ("embedding.weight", "head.weight", "q.weight", "k.weight", "v.weight", "gate.weight", "up.weight")
COLUMNS = ("attention.o.weight", "feed_forward.down.weight")


@dataclass(frozen=True)
class Part:
    """What one rank has of a model."""

    chunks: tuple[range, ...]  # of layers; of a stage that comes several times, one each time
    has_embedding: bool = True  # has the embedding: the first stage
    has_head: bool = True  # has the last norm and the head: the last stage
    index: int = 0  # of `size` ranks that share each layer
    size: int = 1
    tied: bool = False  # embedding and head are one tensor
    head_dim: int = 1
    sequence: bool = False  # between branches positions are shared out, too

    @property
    def layers(self) -> list[int]:
        return [layer for chunk in self.chunks for layer in chunk]

    def chunk_of(self, name: str) -> int:
        """In which chunk a parameter of this part is. Pure."""
        words = name.split(".")
        if words[0] == "blocks":
            return next(i for i, layers in enumerate(self.chunks) if int(words[1]) in layers)
        return 0 if words[0] == "embedding" else len(self.chunks) - 1

    def share(self, count: int) -> range:
        """Of so many rows, channels or heads, this rank's: as even as they go. Pure."""
        return range(self.index * count // self.size, (self.index + 1) * count // self.size)

    def positions(self, count: int) -> range:
        """Of so many positions of a sequence, those whose hidden states are here between branches. Pure."""
        return self.share(count) if self.sequence else range(count)

    def global_name(self, name: str) -> str:
        """What the whole model calls a parameter of this part: tied, a last stage's head is the embedding. Pure."""
        return "embedding.weight" if self.tied and name == "head.weight" else name

    def box(self, name: str, size: tuple[int, ...]) -> tuple[slice, ...]:
        """Which box of the whole model's parameter, of shape `size`, is here. Pure."""
        unit = self.head_dim if ".attention." in name else 1  # heads are never cut
        if name.endswith((*ROWS, *COLUMNS)):
            dim = int(name.endswith(COLUMNS))
            mine = self.share(size[dim] // unit)
            cut = slice(mine.start * unit, mine.stop * unit)
            return (cut, slice(0, size[1])) if dim == 0 else (slice(0, size[0]), cut)
        return tuple(slice(0, length) for length in size)

    def has(self, name: str) -> bool:
        """Is something of this parameter of the whole model here? Pure."""
        words = name.split(".")
        if words[0] == "blocks":
            return int(words[1]) in self.layers
        return self.has_head and (words[0] != "embedding" or self.tied) or words[0] == "embedding" and self.has_embedding

    def sizes(self, whole: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Of what is here of the whole model's parameters. Pure."""
        return {name: tuple(s.stop - s.start for s in self.box(name, size)) for name, size in whole.items() if self.has(name)}

    def is_cut(self, name: str) -> bool:
        """Does each of the ranks that share a layer have another part of it? Pure."""
        return self.size > 1 and name.endswith((*ROWS, *COLUMNS))


def whole(shape: Shape) -> Part:
    """All of it. Pure."""
    return Part((range(shape.num_layers),), tied=shape.tie_embeddings, head_dim=shape.head_dim)


def part_of(
    shape: Shape, stage: int, stages: int, index: int, size: int, sequence: bool = False, chunks: int = 1
) -> Part:
    """Of a rank in stage `stage` of `stages`, number `index` of the `size` that share its layers, and sequences if so; chunks:
    how often the stage comes. Pure."""
    runs = tuple(stage_layers(shape, stages * chunks)[stage::stages])
    return Part(runs, stage == 0, stage == stages - 1, index, size, shape.tie_embeddings, shape.head_dim, sequence)


def stage_layers(shape: Shape, stages: int) -> list[range]:
    """Layers of each stage, such that the slowest stage is as fast as can be: by floating-point operations a token, the head's
    among them. Contiguous, at least one each. Pure."""
    if not isinstance(shape, TransformerShape) or stages == 1:
        return [range(shape.num_layers)]
    d, t = shape.model_dim, shape.seq_len
    heads = 2 * shape.num_heads + 2 * shape.num_kv_heads
    block = d * heads * shape.head_dim + 3 * d * shape.hidden_dim + 2 * t * shape.num_heads * shape.head_dim
    head, count = shape.vocab_size * d, shape.num_layers

    def slowest(last: int) -> int:
        return max(last * block + head, -(-(count - last) // (stages - 1)) * block)

    rest = count - min(range(1, count - stages + 2), key=slowest)
    bounds = [i * rest // (stages - 1) for i in range(stages)]
    return [*(range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)), range(rest, count)]


def refuse(shape: Shape, tp: int, pp: int, chunks: int = 1) -> None:
    """UsageError for a cut that is not to be had, with the nearest that are. Pure."""
    if not isinstance(shape, TransformerShape):
        if tp * pp > 1:
            raise UsageError(f"tp={tp}, pp={pp}: of model.kind=transformer alone it is known how to cut it: leave them 1")
        return
    heads = shape.num_kv_heads
    if heads % tp:
        fit = [n for n in range(1, heads + 1) if heads % n == 0]
        near = sorted({max(n for n in fit if n <= tp), min([n for n in fit if n >= tp], default=heads)})
        raise UsageError(
            f"mesh.tp={tp}: the {heads} key-value heads of the model do not divide by it, and a head is never cut; "
            f"mesh.tp={' or '.join(map(str, near))} would do (hidden channels and vocabulary may be cut unevenly)"
        )
    if pp > shape.num_layers:
        raise UsageError(
            f"mesh.pp={pp}: the model has {shape.num_layers} layers, and a stage has one at least: mesh.pp={shape.num_layers} "
            "is the most"
        )
    if pp * chunks > shape.num_layers:
        raise UsageError(
            f"mesh.pp={pp} x mesh.interleave={chunks}: the model has {shape.num_layers} layers, and a chunk of a stage has one "
            f"at least: mesh.interleave={shape.num_layers // pp} is the most"
        )

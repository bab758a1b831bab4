"""Finds the meshes of N ranks that have enough memory for a model, and predicts the step time of each mesh.

memory.py computes the memory. time.py computes the time and the bytes sent. Each input value is given on the command line,
measured in a run, read from cluster.json, or assumed. The output lists the values with their sources. This module imports neither
torch nor MPI.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mpidp.errors import DataError, UsageError
from mpidp.metrics.progress import peak_flops
from mpidp.model.options import DEFAULTS as OPTIONS
from mpidp.model.options import TransformerOptions
from mpidp.plan.mesh.memory import Memory, largest
from mpidp.plan.mesh.sizes import ModelSizes, Shape, Work
from mpidp.plan.mesh.time import LinkSpeed, Machine, Step, measured_machine, step_of
from mpidp.plan.ranks import measured

KNOWN = {  # number of parameters: (name, sizes), as published
    1.10e9: ("TinyLlama 1.1B", ModelSizes(22, 2048, 5632, 32, 4, 32000, 2048)),
    6.74e9: ("LLaMA 2 7B", ModelSizes(32, 4096, 11008, 32, 32, 32000, 4096)),
    8.03e9: ("Llama 3.1 8B", ModelSizes(32, 4096, 14336, 32, 8, 128256, 8192)),
    13.02e9: ("LLaMA 2 13B", ModelSizes(40, 5120, 13824, 40, 40, 32000, 4096)),
    70.55e9: ("Llama 3.1 70B", ModelSizes(80, 8192, 28672, 64, 8, 128256, 8192)),
    405.85e9: ("Llama 3.1 405B", ModelSizes(126, 16384, 53248, 128, 8, 128256, 8192)),
}
NEAR = 0.05  # relative difference in parameters up to which a published model is used
VOCAB, SEQ_LEN = 32000, 4096  # vocabulary and sequence length of models that are not published
ROOM = 0.9  # usable fraction of the memory; the rest is for libraries, message buffers and fragmentation
MICRO_BATCHES = (1, 2, 4, 8, 16)  # micro-batch sizes that are tried
SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
FLOPS, MEMORY = {2: 500e12, 4: 50e12}, 2.5e12  # assumed of an H100: FLOP/s by bytes per number, and bytes/s
INSIDE, BETWEEN, LATE, RANKS_A_NODE, OVERLAP = 300e9, 400e9, 10e-6, 8, 0.8  # assumed: bytes/s, bytes/s, s, ranks, a fraction
OF_PEAK = 0.5  # assumed fraction of the datasheet's FLOP/s


def number(given: str, name: str) -> float:
    """Return the number in a text such as 7b, 100m, 1.5k or 4e9. given: the text. name: the name of the option in error
    messages. Raises UsageError unless the number is above 0. Pure."""
    text = given.strip().lower()
    try:
        value = float(text[:-1]) * SUFFIXES[text[-1]] if text[-1:] in SUFFIXES else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise UsageError(f"--{name}={given}: give a number above 0, for example 7b, 350m or 4e9")
    return value


def model_of(parameters: float, vocab_size: int = 0, seq_len: int = 0) -> tuple[ModelSizes, str]:
    """Return (sizes of a LLaMA-like model with about `parameters` parameters, name or description of this model). If a
    published model is within 5% of `parameters` and has the vocabulary size `vocab_size`, it is returned. Otherwise the sizes are
    chosen so that the number of layers is about model_dim / 128. vocab_size, seq_len: 0 means the default. Raises UsageError if
    no LLaMA-like model has about this many parameters, for example because the vocabulary is too large. Pure."""
    for known, (name, model) in KNOWN.items():
        if abs(parameters - known) <= NEAR * known and vocab_size in (0, model.vocab_size):
            return replace(model, seq_len=seq_len or model.seq_len), name
    vocab_size = vocab_size or VOCAB
    best: tuple[float, ModelSizes] | None = None
    for dim in [*range(64, 1024, 64), *range(1024, 2048, 128), *range(2048, 49152, 512)]:
        head_dim = 128 if dim >= 2048 else 64
        hidden = -(-8 * dim // (3 * 64)) * 64
        base = ModelSizes(1, dim, hidden, dim // head_dim, dim // head_dim, vocab_size, seq_len or SEQ_LEN)
        layers = round((parameters - 2 * base.table) / base.block)
        layers = layers if layers < 8 else 4 * round(layers / 4)  # a multiple of 4, so that stages can have equal sizes
        if layers >= 1:
            model = replace(base, num_layers=layers)
            off = abs(model.parameters / parameters - 1) + 0.05 * abs(math.log(layers * 128 / dim))
            best = (off, model) if best is None or off < best[0] else best
    if best is None or abs(best[1].parameters / parameters - 1) > 0.25:
        raise UsageError(f"--params={parameters:g}: no model of this size fits a vocabulary of {vocab_size:,} tokens. Give "
                         "--vocab or --config")
    return best[1], "about width / 128 layers"


def vocab_size_of(values: Mapping[str, Any]) -> int:
    """Return the vocabulary size that a configuration {section.key: value} sets. If it sets none, return the vocabulary size of
    its data. Raises UsageError if the vocabulary size is not set and the data cannot be read. Independent."""
    from mpidp.data.shard_folder import open_index  # imported here, because it imports numpy

    try:
        return int(values.get("model.vocab_size", 0)) or open_index(str(values.get("data.path"))).vocab_size
    except DataError as error:
        raise UsageError(f"the vocabulary size is not known, because the data cannot be read ({error}). Give --vocab") from error


def model_of_config(values: Mapping[str, Any], vocab_size: int) -> ModelSizes:
    """Return the sizes of the model of a configuration. values: {section.key: value}. Pure."""
    m = {key: values[f"model.{key}"] for key in ("num_layers", "model_dim", "num_heads", "seq_len", "tie_embeddings")}
    hidden = values["model.hidden_dim"] or -(-8 * m["model_dim"] // (3 * 64)) * 64
    heads = values["model.num_kv_heads"] or m["num_heads"]
    options = TransformerOptions(**{name: values.get(f"model.{name}", plain) for name, plain in OPTIONS.items()})
    head_size = int(values.get("model.head_dim", 0))
    return ModelSizes(
        **m, hidden_dim=hidden, num_kv_heads=heads, vocab_size=vocab_size, head_size=head_size, options=options,
        lora_rank=values.get("model.lora_rank", 0), lora_targets=values.get("model.lora_targets", ""),
    )


@dataclass(frozen=True)
class GivenFigures:
    """Figures from the command line. A figure that is not given is None."""

    flops: float | None = None
    memory_bytes_per_second: float | None = None
    inside_bytes_per_second: float | None = None
    between_bytes_per_second: float | None = None
    latency_seconds: float | None = None
    ranks_a_node: int | None = None
    devices_a_node: int | None = None
    overlap: float | None = None


def machine_of(
    given: GivenFigures, cluster: Mapping[str, Any], run: tuple[float, float] | None, number_bytes: int
) -> tuple[Machine, list[str]]:
    """Return (machine, lines that state each figure and its source). Each figure is taken from the first source that has it. The
    sources are, in order, `given` (the command line), `run` (FLOP/s and memory bytes/s), `cluster` (cluster.json), and
    assumptions. number_bytes: bytes per number in matrix products. Pure."""
    sources: list[str] = []

    def choose(what: str, unit: str, one: float, *options: tuple[str, float | None]) -> float:
        where, value = next((where, float(value)) for where, value in options if value is not None)
        sources.append(f"{what}: {value / one:,.4g} {unit}".rstrip() + f" ({where})")
        return value

    def most(key: str) -> int | None:
        return max(cluster.get(key) or [0]) or None

    file, assumed = "cluster.json", "assumed"
    speed, nodes = cluster.get("bandwidth_bytes_per_second"), cluster.get("between") != "ranks of one node"
    gpu = cluster.get("gpu") or ""
    peak = peak_flops(gpu) if number_bytes == 2 else None
    flops = choose("matrix products", "TFLOP/s per rank", 1e12, ("given", given.flops), ("measured", run and run[0]),
                   (f"assumed: half of the peak of {gpu}", OF_PEAK * peak if peak else None), (assumed, FLOPS[number_bytes]))
    memory = choose("memory bandwidth", "GB/s", 1e9, ("given", given.memory_bytes_per_second), ("measured", run and run[1]),
                    (assumed, MEMORY))
    ranks = int(choose("ranks per node", "", 1, ("given", given.ranks_a_node), (file, most("ranks_per_node")),
                       (assumed, RANKS_A_NODE)))
    devices = most("gpus_per_node") or most("cores_per_node")
    devices = int(choose("devices per node", "", 1, ("given", given.devices_a_node), (file, devices and min(devices, ranks)),
                         ("one per rank", ranks)))
    inside = choose("link within a node", "Gbit/s per rank", 0.125e9, ("given", given.inside_bytes_per_second),
                    (file, None if nodes else speed), (assumed, INSIDE))
    between = choose("network of a node", "Gbit/s", 0.125e9, ("given", given.between_bytes_per_second),
                     (file, speed if nodes else None), (assumed, BETWEEN))
    late = choose("latency", "us", 1e-6, ("given", given.latency_seconds), (file, cluster.get("latency_seconds")),
                  (assumed, LATE))
    overlap = choose("overlap of dp traffic", "of the possible overlap", 1, ("given", given.overlap), (assumed, OVERLAP))
    return Machine(flops, memory, LinkSpeed(late, inside), LinkSpeed(late, between), ranks, devices, overlap), sources


def machine_of_run(run: Path, vocab_size: int) -> tuple[float, float]:
    """Return (FLOP/s, memory bytes/s), computed from the step times of a run of mpidp.train on one rank. run: its folder.
    vocab_size: 0 means that of the run. Raises UsageError if the run recorded no step times on one rank. Independent."""
    found = measured.read(run)
    times = [one for one in measured.seconds([found]) if one.ranks == 1]
    if not times or not times[0].update or "model.num_layers" not in found.config:
        raise UsageError(f"--calibrate={run} has no usable step times of one rank. Give a run on one rank, because its step "
                         "times contain no waiting for other ranks")
    model = model_of_config(found.config, vocab_size or vocab_size_of(found.config))
    count, size = found.lanes.num_micro_batches, 4 if found.config.get("train.dtype") == "float32" else 2
    return measured_machine(model, found.lanes.micro_batch, count * times[0].micro_batch, times[0].update, count, size)


@dataclass(frozen=True)
class MeshRow:
    """A mesh, the best settings for this mesh, and the memory and step time with these settings."""

    shape: Shape
    work: Work
    memory: Memory
    step: Step

    def plain(self) -> dict[str, Any]:
        """Return the row as plain values, for JSON."""
        return {
            **asdict(self.shape), "micro_batch": self.work.micro_batch, "micro_batches": self.work.micro_batches(self.shape),
            "recompute": self.work.recompute > 0, "sequence": self.work.sequence,
            "memory_bytes": {**asdict(self.memory), "total": self.memory.total},
            **asdict(self.step), "step_seconds": self.step.seconds,
        }  # fmt: skip


def shapes(model: ModelSizes, ranks: int, most_dp: int, slices: int = 1) -> Iterator[Shape]:
    """Yield all possible meshes of `ranks` ranks. tp divides the number of key-value heads, and each stage has at least one
    layer. dp is at most `most_dp`. If `slices` (model.slices) is above 1, tp also divides `slices`, and a model with tied
    embeddings has one stage, because with more stages, the first and the last stage would exchange the gradient of the
    embedding for every micro-batch. Pure."""
    for tp in range(1, min(ranks, model.num_kv_heads) + 1):
        if ranks % tp or model.num_kv_heads % tp or (slices > 1 and slices % tp):
            continue
        for pp in range(1, min(ranks // tp, 1 if slices > 1 and model.tie_embeddings else model.num_layers) + 1):
            dp, rest = divmod(ranks // tp, pp)
            if rest == 0 and dp <= most_dp:
                yield from (Shape(dp, pp, tp, shard) for shard in range(1 if dp == 1 else 4))


def rows_of(
    model: ModelSizes, ranks: int, machine: Machine, base: Work, limit: float, micro: Sequence[int], again: Sequence[bool],
    parts: Sequence[bool],
) -> list[MeshRow]:
    """Return a row for each mesh, with the fastest settings that fit in memory. If no settings fit, the row has the settings that
    need the least memory. Rows that fit come first, sorted by time. The other rows follow, sorted by memory.

    base: the global batch, the dtypes and other fixed settings. limit: bytes of memory per rank. micro: the micro-batch sizes to
    try. again: the values of recompute to try. parts: the values of mesh.sequence to try. Pure."""
    best: dict[tuple[int, int, int], tuple[tuple[bool, float, int, bool, bool], MeshRow]] = {}
    for shape in shapes(model, ranks, base.global_batch // min(micro), base.slices):
        for size in micro:
            if size * shape.dp > base.global_batch:
                continue
            for recompute, sequence in product(again, sorted({shape.tp > 1 and one for one in parts})):
                work = replace(base, micro_batch=size, recompute=float(recompute), sequence=sequence)
                row = MeshRow(shape, work, largest(model, shape, work), step_of(model, shape, work, machine))
                over = row.memory.total > ROOM * limit
                key = (over, row.memory.total if over else row.step.seconds, shape.shard, recompute, sequence)
                mesh = (shape.dp, shape.pp, shape.tp)
                if mesh not in best or key < best[mesh][0]:
                    best[mesh] = key, row
    return [row for _, row in sorted(best.values(), key=lambda one: one[0])]


def three_ways(
    rows: Sequence[MeshRow], ranks: int, parameters: float, samples: float | None, limit: float
) -> list[dict[str, Any]]:
    """Return three dictionaries, for the best data-parallel, the best model-parallel and the best hybrid mesh. Each dictionary
    also has the numbers of parameters and samples per rank. rows: the result of rows_of(). parameters: the number of
    parameters of the model. samples: the number of samples in the data. limit: bytes of memory per rank. Pure."""
    kinds = {
        "data": [row for row in rows if row.shape.dp == ranks], "model": [row for row in rows if row.shape.dp == 1],
        "hybrid": [row for row in rows if 1 < row.shape.dp < ranks],
    }  # fmt: skip
    found = []
    for kind, those in kinds.items():
        row = those[0] if those else None
        dp = {"data": ranks, "model": 1}.get(kind, row.shape.dp if row else 0)
        found.append({
            "kind": kind, "mesh": str(row.shape) if row else None, "dp": dp or None,
            "parameters": parameters * dp / ranks if dp else None, "samples": samples / dp if dp and samples else None,
            "memory_bytes": row.memory.total if row else None, "step_seconds": row.step.seconds if row else None,
            "fits": row is not None and row.memory.total <= ROOM * limit,
        })  # fmt: skip
    return found


def plan_mesh(
    model: ModelSizes, taken: str, parameters: float, ranks: int, limit: float, machine: Machine, sources: Sequence[str],
    base: Work, micro: Sequence[int] = MICRO_BATCHES, again: Sequence[bool] = (False, True),
    parts: Sequence[bool] = (False, True), samples: float | None = None, top: int = 5,
) -> dict[str, Any]:
    """Return the results of `plan mesh` as plain values. taken: a text that says where the model comes from. parameters: the
    requested number of parameters. sources: lines that state the figures of the machine and their sources. samples: number of
    samples in the data. top: number of meshes to return. For the other arguments see rows_of(). Raises UsageError if no mesh is
    possible. Pure."""
    micro = [size for size in micro if size <= base.global_batch]
    if not micro:
        raise UsageError(f"the micro-batch exceeds the global batch of {base.global_batch} sequences. Raise --global-batch")
    rows = rows_of(model, ranks, machine, base, limit, micro, again, parts)
    if not rows:
        sliced = f" and {base.slices} (model.slices)" if base.slices > 1 else ""
        raise UsageError(
            f"--ranks={ranks}: no mesh has this number of ranks (ranks = dp x pp x tp), because tp must divide "
            f"{model.num_kv_heads} (key-value heads){sliced}, pp is at most {model.num_layers} (layers), and dp is at most "
            f"{base.global_batch // min(micro)} (micro-batches). Choose another number, or a larger --global-batch"
        )
    fits = [row for row in rows if row.memory.total <= ROOM * limit]
    return {
        "ranks": ranks, "memory_limit_bytes": limit, "model": model.plain(), "model_from": taken, "parameters": model.parameters,
        "trained": model.trained, "parameters_asked": parameters, "samples": samples, "global_batch": base.global_batch,
        "number_bytes": base.number_bytes, "tokens_a_step": base.global_batch * model.seq_len, "machine": list(sources),
        "meshes": len(rows), "fitting": len(fits),
        "three_ways": three_ways(rows, ranks, parameters, samples, limit), "rows": [row.plain() for row in (fits or rows)[:top]],
    }  # fmt: skip

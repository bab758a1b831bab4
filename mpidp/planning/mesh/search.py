"""`python -m mpidp.plan mesh`: which meshes of so many ranks hold a model, and how long a step takes on each. No torch, no MPI.

Memory is that of mesh_memory.py, seconds and bytes those of mesh_time.py. Every figure says where it comes from: given, measured
in a RUN, cluster.json, or assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mpidp.data.index import read_index
from mpidp.errors import DataError, UsageError
from mpidp.metrics.progress import peak_flops
from mpidp.planning.mesh.memory import Memory, Model, Shape, Work, largest
from mpidp.planning.mesh.time import Link, Machine, Step, measured_machine, step_of
from mpidp.planning.ranks import measured

KNOWN = {  # parameters: (name, sizes), as published
    1.10e9: ("TinyLlama 1.1B", Model(22, 2048, 5632, 32, 4, 32000, 2048)),
    6.74e9: ("LLaMA 2 7B", Model(32, 4096, 11008, 32, 32, 32000, 4096)),
    8.03e9: ("Llama 3.1 8B", Model(32, 4096, 14336, 32, 8, 128256, 8192)),
    13.02e9: ("LLaMA 2 13B", Model(40, 5120, 13824, 40, 40, 32000, 4096)),
    70.55e9: ("Llama 3.1 70B", Model(80, 8192, 28672, 64, 8, 128256, 8192)),
    405.85e9: ("Llama 3.1 405B", Model(126, 16384, 53248, 128, 8, 128256, 8192)),
}
NEAR = 0.05  # of the parameters asked for, to be one of these
VOCAB, SEQ_LEN = 32000, 4096
ROOM = 0.9  # of the memory; the rest is for libraries, buffers of messages and holes
MICRO_BATCHES = (1, 2, 4, 8, 16)  # that are tried
SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
FLOPS, MEMORY = {2: 500e12, 4: 50e12}, 2.5e12  # assumed: an H100, in a machine of eight; by the bytes of a number
INSIDE, BETWEEN, LATE, RANKS_A_NODE, OVERLAP = 300e9, 400e9, 10e-6, 8, 0.8
OF_PEAK = 0.5  # of a datasheet's products a second


def number(words: str, name: str) -> float:
    """7b, 100m, 1.5k, 4e9. UsageError for what is not a number above 0. Pure."""
    text = words.strip().lower()
    try:
        value = float(text[:-1]) * SUFFIXES[text[-1]] if text[-1:] in SUFFIXES else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise UsageError(f"--{name}={words}: give a number above 0, as 7b, 350m or 4e9")
    return value


def model_of(parameters: float, vocab_size: int = 0, seq_len: int = 0) -> tuple[Model, str]:
    """(a LLaMA-like model of about so many parameters, what was taken): a published one where there is one, else twelve times
    layers x width^2 with layers near width / 128. UsageError. Pure."""
    for known, (name, model) in KNOWN.items():
        if abs(parameters - known) <= NEAR * known and vocab_size in (0, model.vocab_size):
            return replace(model, seq_len=seq_len or model.seq_len), name
    vocab_size = vocab_size or VOCAB
    best: tuple[float, Model] | None = None
    for dim in [*range(64, 1024, 64), *range(1024, 2048, 128), *range(2048, 49152, 512)]:
        head_dim = 128 if dim >= 2048 else 64
        hidden = -(-8 * dim // (3 * 64)) * 64
        base = Model(1, dim, hidden, dim // head_dim, dim // head_dim, vocab_size, seq_len or SEQ_LEN)
        layers = round((parameters - 2 * base.table) / base.block)
        layers = layers if layers < 8 else 4 * round(layers / 4)  # so that stages can be even
        if layers >= 1:
            model = replace(base, num_layers=layers)
            off = abs(model.parameters / parameters - 1) + 0.05 * abs(math.log(layers * 128 / dim))
            best = (off, model) if best is None or off < best[0] else best
    if best is None or abs(best[1].parameters / parameters - 1) > 0.25:
        raise UsageError(
            f"--params={parameters:g}: a vocabulary of {vocab_size:,} suits no model of so few or so many; --vocab, --config"
        )
    return best[1], "by rule: width / 128 layers, or nearly"


def vocab_size_of(values: Mapping[str, Any]) -> int:
    """Of the data that {section.key: value} names. UsageError where they are not here. Independent."""
    try:
        return int(values.get("model.vocab_size", 0)) or read_index(Path(str(values.get("data.path")))).vocab_size
    except DataError as error:
        raise UsageError(f"--vocab says how many tokens there are; the data do not: {error}") from error


def model_of_config(values: Mapping[str, Any], vocab_size: int) -> Model:
    """Of {section.key: value}. Pure."""
    m = {key: values[f"model.{key}"] for key in ("num_layers", "model_dim", "num_heads", "seq_len", "tie_embeddings")}
    hidden = values["model.hidden_dim"] or -(-8 * m["model_dim"] // (3 * 64)) * 64
    return Model(**m, hidden_dim=hidden, num_kv_heads=values["model.num_kv_heads"] or m["num_heads"], vocab_size=vocab_size)


@dataclass(frozen=True)
class Given:
    """Figures of the command line; None: not given."""

    flops: float | None = None
    memory_bytes_per_second: float | None = None
    inside_bytes_per_second: float | None = None
    between_bytes_per_second: float | None = None
    latency_seconds: float | None = None
    ranks_a_node: int | None = None
    devices_a_node: int | None = None
    overlap: float | None = None


def machine_of(
    given: Given, cluster: Mapping[str, Any], run: tuple[float, float] | None, number_bytes: int
) -> tuple[Machine, list[str]]:
    """(machine, where each figure is from): given, else of a run (flops, memory), else of cluster.json, else assumed. Pure."""
    said: list[str] = []

    def choose(what: str, unit: str, one: float, *sources: tuple[str, float | None]) -> float:
        where, value = next((where, float(value)) for where, value in sources if value is not None)
        said.append(f"{what}: {value / one:,.4g} {unit}".rstrip() + f" ({where})")
        return value

    def most(key: str) -> int | None:
        return max(cluster.get(key) or [0]) or None

    file, assumed = "cluster.json", "assumed"
    speed, nodes = cluster.get("bandwidth_bytes_per_second"), cluster.get("between") != "ranks of one node"
    gpu = cluster.get("gpu") or ""
    peak = peak_flops(gpu) if number_bytes == 2 else None
    flops = choose("products", "TFLOP/s a rank", 1e12, ("given", given.flops), ("measured", run and run[0]),
                   (f"assumed: half of what {gpu} is sold for", OF_PEAK * peak if peak else None), (assumed, FLOPS[number_bytes]))
    memory = choose("memory", "GB/s", 1e9, ("given", given.memory_bytes_per_second), ("measured", run and run[1]),
                    (assumed, MEMORY))
    ranks = int(choose("ranks a node", "", 1, ("given", given.ranks_a_node), (file, most("ranks_per_node")),
                       (assumed, RANKS_A_NODE)))
    devices = most("gpus_per_node") or most("cores_per_node")
    devices = int(choose("devices a node", "", 1, ("given", given.devices_a_node), (file, devices and min(devices, ranks)),
                         ("one a rank", ranks)))
    inside = choose("link within a node", "Gbit/s a rank", 0.125e9, ("given", given.inside_bytes_per_second),
                    (file, None if nodes else speed), (assumed, INSIDE))
    between = choose("network of a node", "Gbit/s", 0.125e9, ("given", given.between_bytes_per_second),
                     (file, speed if nodes else None), (assumed, BETWEEN))
    late = choose("latency", "us", 1e-6, ("given", given.latency_seconds), (file, cluster.get("latency_seconds")),
                  (assumed, LATE))
    overlap = choose("dp traffic that hides", "of what could", 1, ("given", given.overlap), (assumed, OVERLAP))
    return Machine(flops, memory, Link(late, inside), Link(late, between), ranks, devices, overlap), said


def machine_of_run(run: Path, vocab_size: int) -> tuple[float, float]:
    """(flops, memory's bytes a second) of a RUN of mpidp.train on one rank. UsageError. Independent."""
    facts = measured.read(run)
    times = [one for one in measured.seconds([facts]) if one.ranks == 1]
    if not times or not times[0].update or "model.num_layers" not in facts.config:
        raise UsageError(f"--calibrate={run}: give a run of one rank, whose step was timed with nobody to wait for")
    model = model_of_config(facts.config, vocab_size or vocab_size_of(facts.config))
    count, size = facts.lanes.num_micro_batches, 4 if facts.config.get("train.dtype") == "float32" else 2
    return measured_machine(model, facts.lanes.micro_batch, count * times[0].micro_batch, times[0].update, count, size)


@dataclass(frozen=True)
class Row:
    """One mesh with its best cut of a step."""

    shape: Shape
    work: Work
    memory: Memory
    step: Step

    def plain(self) -> dict[str, Any]:
        return {
            **asdict(self.shape), "micro_batch": self.work.micro_batch, "micro_batches": self.work.micro_batches(self.shape),
            "recompute": self.work.recompute > 0, "sequence": self.work.sequence,
            "memory_bytes": {**asdict(self.memory), "total": self.memory.total},
            **asdict(self.step), "step_seconds": self.step.seconds,
        }  # fmt: skip


def shapes(model: Model, ranks: int, most_dp: int) -> Iterator[Shape]:
    """All that can be: tp divides key-value heads, a stage has a layer, a replica a micro-batch. Pure."""
    for tp in range(1, min(ranks, model.num_kv_heads) + 1):
        if ranks % tp or model.num_kv_heads % tp:
            continue
        for pp in range(1, min(ranks // tp, model.num_layers) + 1):
            dp, rest = divmod(ranks // tp, pp)
            if rest == 0 and dp <= most_dp:
                yield from (Shape(dp, pp, tp, shard) for shard in range(1 if dp == 1 else 2 if pp > 1 else 4))


def rows_of(
    model: Model, ranks: int, machine: Machine, base: Work, limit: float, micro: Sequence[int], again: Sequence[bool],
    parts: Sequence[bool],
) -> list[Row]:
    """Of each mesh the fastest cut that fits, else the smallest; those that fit first, then by seconds. Pure."""
    best: dict[tuple[int, int, int], tuple[tuple[bool, float, int, bool, bool], Row]] = {}
    for shape in shapes(model, ranks, base.global_batch // min(micro)):
        for size in micro:
            if size * shape.dp > base.global_batch:
                continue
            for recompute, sequence in product(again, sorted({shape.tp > 1 and one for one in parts})):
                work = replace(base, micro_batch=size, recompute=float(recompute), sequence=sequence)
                row = Row(shape, work, largest(model, shape, work), step_of(model, shape, work, machine))
                over = row.memory.total > ROOM * limit
                key = (over, row.memory.total if over else row.step.seconds, shape.shard, recompute, sequence)
                mesh = (shape.dp, shape.pp, shape.tp)
                if mesh not in best or key < best[mesh][0]:
                    best[mesh] = key, row
    return [row for _, row in sorted(best.values(), key=lambda one: one[0])]


def three_ways(rows: Sequence[Row], ranks: int, parameters: float, samples: float | None, limit: float) -> list[dict[str, Any]]:
    """Data, model, hybrid: what of the parameters and samples each rank has, by the best mesh of each kind. Pure."""
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
    model: Model, taken: str, parameters: float, ranks: int, limit: float, machine: Machine, said: Sequence[str], base: Work,
    micro: Sequence[int] = MICRO_BATCHES, again: Sequence[bool] = (False, True),
    parts: Sequence[bool] = (False, True), samples: float | None = None, top: int = 5,
) -> dict[str, Any]:
    """What is printed, as plain values. parameters: as asked for; limit: bytes a rank. UsageError. Pure."""
    micro = [size for size in micro if size <= base.global_batch]
    if not micro:
        raise UsageError(f"a micro-batch is more than the global batch of {base.global_batch} sequences: raise --global-batch")
    rows = rows_of(model, ranks, machine, base, limit, micro, again, parts)
    if not rows:
        raise UsageError(
            f"--ranks={ranks}: no mesh of so many has a part for each: tp divides {model.num_kv_heads} "
            f"key-value heads; pp is at most {model.num_layers} layers, dp {base.global_batch // min(micro)} "
            "micro-batches. "
            "Take another number, or a larger --global-batch"
        )
    fits = [row for row in rows if row.memory.total <= ROOM * limit]
    return {
        "ranks": ranks, "memory_limit_bytes": limit, "model": asdict(model), "model_from": taken, "parameters": model.parameters,
        "parameters_asked": parameters, "samples": samples, "global_batch": base.global_batch, "number_bytes": base.number_bytes,
        "tokens_a_step": base.global_batch * model.seq_len, "machine": list(said), "meshes": len(rows), "fitting": len(fits),
        "three_ways": three_ways(rows, ranks, parameters, samples, limit), "rows": [row.plain() for row in (fits or rows)[:top]],
    }  # fmt: skip

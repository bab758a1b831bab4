"""Formats the table that `python -m mpidp.plan mesh` prints. Pure."""

from __future__ import annotations

from typing import Any

from mpidp.plan.ranks.table import size

PARTS = ("parameters", "gradients", "optimizer", "working", "activations", "logits")
PHASES = ("compute", "tp", "pipeline", "dp", "update")


def many(number: float | None, digits: int = 4) -> str:
    """Format a count, for example as 6.25 million or 2 billion. The letter B is used only for bytes. Pure."""
    if number is None:
        return "-"
    for unit, one in ((" trillion", 1e12), (" billion", 1e9), (" million", 1e6), (" thousand", 1e3)):
        if number >= one:
            return f"{number / one:.{digits}g}{unit}"
    return f"{number:.{digits}g}"


def seconds(value: float | None) -> str:
    """Format a time, for example as 1.5 s or 230 ms. Pure."""
    return "-" if value is None else f"{value:.3g} s" if value >= 1 or not value else f"{1e3 * value:.3g} ms"


def mesh_table(found: dict[str, Any]) -> str:
    """Format the result of plan_mesh() as text. Pure."""
    model, limit, ways = found["model"], found["memory_limit_bytes"], found["three_ways"]
    lines = [
        f"{many(found['parameters_asked'])} parameters on {found['ranks']:,} ranks of {size(limit)}: predicted, not measured",
        f"model: {model['num_layers']} layers, width {model['model_dim']}, hidden width {model['hidden_dim']}, "
        f"{model['num_heads']} heads ({model['num_kv_heads']} key-value), vocabulary {model['vocab_size']:,}, "
        f"{many(found['parameters'])} parameters ({found['model_from']})",
        *([f"LoRA: {many(found['trained'])} parameters of adapters are trained"] if model.get("lora_rank") else []),
        f"step: {found['global_batch']:,} sequences of {model['seq_len']:,} tokens ({many(found['tokens_a_step'])} in total), "
        f"{'float32' if found['number_bytes'] == 4 else 'bfloat16'} products with float32 weights",
        *([f"These settings are ignored: {', '.join(found['ignored'])}. The predictions are for training of all parameters with "
           "AdamW and strategy.name=synchronous, without compression and interleaving"] if found.get("ignored") else []),
        "",
        f"{'':<18}" + "".join(f"{way['kind']:>34}" for way in ways),
        f"{'mesh':<18}" + "".join(f"{way['mesh'] or 'none':>34}" for way in ways),
        f"{'parameters/rank':<18}" + "".join(f"{many(way['parameters']):>34}" for way in ways),
    ]
    if found["samples"]:
        lines.append(f"{'samples/rank':<18}" + "".join(f"{many(way['samples']):>34}" for way in ways))
    lines.append(f"{'memory/rank':<18}" + "".join(f"{_memory(way):>34}" for way in ways))
    lines.append(f"{'s/step':<18}" + "".join(f"{seconds(way['step_seconds']):>34}" for way in ways))
    if found["fitting"]:
        lines += ["", f"{found['fitting']} of {found['meshes']} meshes fit in memory. The fastest:"]
    else:
        lines += ["", f"NONE of {found['meshes']} meshes fits in memory. Use more ranks or more memory. The following meshes "
                      "need the least memory:"]
    lines += _rows(found)
    best = found["rows"][0]
    if found["fitting"]:
        per_rank = found["tokens_a_step"] / best["step_seconds"] / found["ranks"]
        settings = [f"--mesh.{axis}={best[axis]}" for axis in ("dp", "pp", "tp", "shard")]
        settings += ["--mesh.sequence=true"] * best["sequence"]
        settings += [f"--train.{key}={str(best[key]).lower()}" for key in ("micro_batch", "lanes", "recompute")]
        useful = best["flops"] / best["step_seconds"] / 1e12
        lines += ["", f"The first mesh: {many(per_rank)} tokens/s and {useful:.4g} TFLOP/s per rank. "
                      f"Settings: {' '.join(settings)}"]
    return "\n".join([*lines, "", "Figures used: " + "; ".join(found["machine"]) + ".",
                      "A tenth of the memory is left free. docs/plan.md explains the formulas, their accuracy and their limits."])


def _memory(way: dict[str, Any]) -> str:
    return "-" if way["memory_bytes"] is None else size(way["memory_bytes"]) + ("" if way["fits"] else ", does not fit")


def _rows(found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    heads = [f"dp {row['dp']} pp {row['pp']} tp {row['tp']}" for row in rows]
    cells: list[tuple[str, list[str]]] = [
        ("mesh", heads),
        ("shard", [str(row["shard"]) for row in rows]),
        ("micro-batch", [f"{row['micro_batch']} x {row['micro_batches']}" for row in rows]),
        *((way, ["yes" if row[way] else "no" for row in rows]) for way in ("recompute", "sequence")),
        *((f"  {part}", [size(row["memory_bytes"][part]) for row in rows]) for part in PARTS),
        ("memory/rank", [size(row["memory_bytes"]["total"]) for row in rows]),
        *((f"  {phase}", [seconds(row[f"{phase}_seconds"]) for row in rows]) for phase in PHASES),
        ("s/step", [seconds(row["step_seconds"]) for row in rows]),
        *((f"  sent, {axis}", [size(row[f"{axis}_bytes"]) for row in rows]) for axis in ("tp", "pp", "dp")),
        ("  leaving the node", [size(row["between_bytes"]) for row in rows]),
    ]
    return [f"{name:<18}" + "".join(f"{cell:>22}" for cell in line) for name, line in cells]

"""Finds the layers that get LoRA adapters, and the shapes of the adapters' parameters (lora.py). Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpidp.errors import UsageError
from mpidp.model.part import TABLES

A, B = ".lora_a", ".lora_b"
ALL = {"q", "k", "v", "o", "gate", "up", "down"}  # the default of model.lora_targets


def adapter_sizes(sizes: Mapping[str, Sequence[int]], rank: int, targets: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the adapters' parameters, by name. A layer gets an adapter if the last component of its name is in
    `targets`. An example of `targets` is "q,v". The default of `targets` names all layers of a block. If `targets` has this
    default, names of layers that the model does not have are ignored.

    sizes: the shapes of the base model's parameters, by name. rank: the rank of an adapter, model.lora_rank. Raises
    UsageError if a name in `targets` matches no layer, or if `rank` exceeds the smaller dimension of a layer that gets an
    adapter. Pure.
    """
    layers = {key.removesuffix(".weight"): size for key, size in sizes.items() if len(size) == 2 and not key.startswith(TABLES)}
    wanted, known = {part.strip() for part in targets.split(",") if part.strip()}, {name.rpartition(".")[2] for name in layers}
    wanted = wanted & known if wanted == ALL else wanted
    if not wanted or wanted - known:
        unknown = ", ".join(sorted(wanted - known))
        problem = f"{unknown}, which this model does not have" if unknown else "no layer"
        raise UsageError(f"model.lora_targets={targets} names {problem}. The model has the layers: {', '.join(sorted(known))}")
    found = {name: size for name, size in layers.items() if name.rpartition(".")[2] in wanted}
    for name, size in found.items():
        if rank > min(size):
            raise UsageError(
                f"model.lora_rank={rank} exceeds the smaller dimension of {name} ({' x '.join(map(str, size))}), so the "
                f"adapter would be larger than the layer. Use at most {min(size)}, or other model.lora_targets"
            )
    return {name + key: (rank, n) if key == A else (m, rank) for key in (A, B) for name, (m, n) in found.items()}

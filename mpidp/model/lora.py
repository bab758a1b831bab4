"""LoRA, low-rank adapters (Hu 2021, section 4.1). A layer W x becomes W x + (alpha / rank) B A x. Only A and B are trained.

A has the shape (rank, inputs). It is initialized uniformly in +-1/sqrt(inputs), like a linear layer of torch. The random numbers
of a layer depend only on the seed and the layer's name. B has the shape (outputs, rank). It is initially zero, so the model first
computes the same results as the base model. A and B are parameters of the layer, `lora_a` and `lora_b`. The layer keeps its name.
Pure torch, no MPI.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpidp.errors import UsageError
from mpidp.model.part import TABLES
from mpidp.model.shape import shapes_of

A, B = ".lora_a", ".lora_b"
ALL = {"q", "k", "v", "o", "gate", "up", "down"}  # the default of model.lora_targets


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter. Pure."""
    return name.endswith((A, B))


def saved_names(names: Sequence[str]) -> list[str]:
    """Return the names of the parameters that a checkpoint contains: only the adapters if there are any, otherwise all
    parameters. Pure."""
    return [name for name in names if is_adapter(name)] or list(names)


def adapter_sizes(sizes: Mapping[str, Sequence[int]], rank: int, targets: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of the adapters, by name. A layer gets an adapter if `targets` lists the last component
    of its name, for example "q,v". The default of `targets`, ALL, also lists layers that some models do not have (GPT-2 has no
    gate). These are then ignored.

    sizes: the shapes of the base model's parameters, by name. Raises UsageError if a target matches no layer, or if the rank
    exceeds the smaller dimension of a target layer. Pure.
    """
    matrices = {name.removesuffix(".weight"): size for name, size in sizes.items() if len(size) == 2}
    layers = {name: size for name, size in matrices.items() if name not in TABLES}
    wanted, known = {part.strip() for part in targets.split(",") if part.strip()}, {name.rpartition(".")[2] for name in layers}
    wanted = wanted & known if wanted == ALL else wanted
    if not wanted or wanted - known:
        unknown = ", ".join(sorted(wanted - known)) or "no layer"
        raise UsageError(f"model.lora_targets={targets} names {unknown}: this model's layers are {', '.join(sorted(known))}")
    found = {name: size for name, size in layers.items() if name.rpartition(".")[2] in wanted}
    for name, size in found.items():
        if rank > min(size):
            raise UsageError(
                f"model.lora_rank={rank} exceeds the smaller dimension of {name} ({' x '.join(map(str, size))}): the "
                f"adapter would be larger than the layer; use at most {min(size)}, or other model.lora_targets"
            )
    return {name + key: (rank, n) if key == A else (m, rank) for key in (A, B) for name, (m, n) in found.items()}


def attach(model: nn.Module, rank: int, alpha: float, targets: str, seed: int) -> None:
    """Add adapters to the target layers of a model, or of a part of a Transformer, and freeze all other parameters. Independent.

    Raises UsageError if a target matches no layer, or if the rank exceeds a layer's smaller dimension.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    own, part = {f"{name}.weight": layer.weight.shape for name, layer in layers.items()}, getattr(model, "part", None)
    sizes = adapter_sizes(own if part is None else shapes_of(cast(Any, model).shape), rank, targets)
    model.requires_grad_(False)
    for name, layer in layers.items():
        if name + A not in sizes:
            continue
        a, b = torch.empty(sizes[name + A]), torch.zeros(sizes[name + B])
        if not layer.weight.is_meta:
            key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
            bound = 1 / math.sqrt(a.shape[1])
            nn.init.uniform_(a, -bound, bound, generator=generator)
        if part is not None:
            a, b = (one[part.box(name + key, tuple(one.shape))].clone() for key, one in ((A, a), (B, b)))
        _add(layer, a.to(layer.weight.device), b.to(layer.weight.device), alpha / rank)


class Adapter:
    """Forward hook that adds an adapter's output to its layer's output. It is the attribute `adapter` of the layer."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.linear: Callable[[Tensor, Tensor], Tensor] = F.linear
        self.factors: Callable[[Any], tuple[Tensor, Tensor]] = lambda layer: (layer.lora_a, layer.lora_b)

    def __call__(self, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        a, b = self.factors(layer)
        return output + self.linear(self.linear(inputs[0], a), b) * self.scale


def weight_of(layer: Any) -> Tensor:
    """Return the weight of a layer. If the layer has an adapter, return W + (alpha / rank) B A, which has gradients. Pure."""
    has_adapter = hasattr(layer, "adapter")
    return layer.weight + layer.lora_b @ layer.lora_a * layer.adapter.scale if has_adapter else layer.weight  # type: ignore[no-any-return]


def _add(layer: Any, a: Tensor, b: Tensor, scale: float) -> None:
    layer.lora_a, layer.lora_b, layer.adapter = nn.Parameter(a), nn.Parameter(b), Adapter(scale)
    layer.register_forward_hook(layer.adapter)


def attach_like(template: nn.Module, model: nn.Module) -> None:
    """Add an adapter with empty matrices to each layer of `template` whose namesake in `model` has an adapter. Independent."""
    for name, layer in model.named_modules():
        if hasattr(layer, "adapter"):
            _add(template.get_submodule(name), torch.empty(0), torch.empty(0), cast(Any, layer).adapter.scale)


@torch.no_grad()
def merged(state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Merge the adapters into the base weights: W + (alpha / rank) B A, in float32, under the base model's names.

    state: all parameters by name. Raises ValueError if the layer of an adapter is missing. Pure.
    """
    found = {name: tensor for name, tensor in state.items() if not is_adapter(name)}
    for name, a in state.items():
        if name.endswith(A):
            layer = name.removesuffix(A)
            if f"{layer}.weight" not in found or layer + B not in state:
                raise ValueError(f"{name} is an adapter without a layer: {layer}.weight or {layer}{B} is missing")
            update = state[layer + B].float() @ a.float()
            found[f"{layer}.weight"] = found[f"{layer}.weight"].float() + update * (alpha / a.shape[0])
    return found

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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpidp.errors import UsageError
from mpidp.model.part import TABLES, Part

A, B = ".lora_a", ".lora_b"
ALL = {"q", "k", "v", "o", "gate", "up", "down"}  # the default of model.lora_targets


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter. Pure."""
    return name.endswith((A, B))


def saved_names(names: Sequence[str]) -> list[str]:
    """Return the names of the parameters that a checkpoint contains: only the adapters if there are any, otherwise all
    parameters. Pure."""
    return [name for name in names if is_adapter(name)] or list(names)


def adapters_of(layers: Mapping[str, Sequence[int]], rank: int, targets: str) -> list[str]:
    """Return the names of the layers that get adapters. A layer gets an adapter if `targets` lists the last component of its
    name, for example "q,v". The default of `targets`, ALL, also lists layers that some models do not have (GPT-2 has no gate).
    These are then ignored.

    layers: the shape (outputs, inputs) of each layer, by name. Raises UsageError if a target matches no layer, or if the rank
    exceeds the smaller dimension of a target layer. Pure.
    """
    wanted, known = {part.strip() for part in targets.split(",") if part.strip()}, {name.rpartition(".")[2] for name in layers}
    wanted = wanted & known if wanted == ALL else wanted
    if not wanted or wanted - known:
        unknown = ", ".join(sorted(wanted - known)) or "no layer"
        raise UsageError(f"model.lora_targets={targets} names {unknown}: this model's layers are {', '.join(sorted(known))}")
    found = [name for name in layers if name.rpartition(".")[2] in wanted]
    for name in found:
        if rank > min(layers[name]):
            raise UsageError(
                f"model.lora_rank={rank} exceeds the smaller dimension of {name} ({' x '.join(map(str, layers[name]))}): the "
                f"adapter would be larger than the layer; use at most {min(layers[name])}, or other model.lora_targets"
            )
    return found


def adapter_sizes(sizes: Mapping[str, Sequence[int]], rank: int, targets: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of the adapters, by name. sizes: the shapes of the base model's parameters. Raises
    UsageError in the same cases as adapters_of(). Pure."""
    layers = _layers_of(sizes)
    names = adapters_of(layers, rank, targets)
    return {name + A: (rank, layers[name][1]) for name in names} | {name + B: (layers[name][0], rank) for name in names}


def _layers_of(sizes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    layers = {name.removesuffix(".weight"): size for name, size in sizes.items() if len(size) == 2}
    return {name: size for name, size in layers.items() if name not in TABLES}


def attach(
    model: nn.Module, rank: int, alpha: float, targets: str, seed: int, part: Part | None = None,
    sizes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Add adapters to the target layers and freeze all other parameters. part, sizes: if `model` is a part of a model, the part
    and the shapes of the whole model's parameters. Independent.

    Raises UsageError if a target matches no layer, or if the rank exceeds a layer's smaller dimension.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    whole = {name: layer.weight.shape for name, layer in layers.items()} if sizes is None else _layers_of(sizes)
    names = [name for name in adapters_of(whole, rank, targets) if name in layers]
    model.requires_grad_(False)
    for name in names:
        layer, (outputs, inputs) = layers[name], whole[name]
        a = torch.empty(rank, inputs)
        if not layer.weight.is_meta:
            key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
            nn.init.uniform_(a, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
        found = {A: a, B: torch.zeros(outputs, rank)}
        if part is not None:
            found = {key: one[part.box(name + key, tuple(one.shape))].clone() for key, one in found.items()}
        _add(layer, *(one.to(layer.weight.device) for one in found.values()), alpha / rank)


class Adapter:
    """Forward hook that adds an adapter's output to its layer's output. It is the attribute `adapter` of the layer."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.deferred = False  # whether the loss applies the layer instead (Transformer.defer_head), with the weight weight_of()
        self.factors: Callable[[Any], tuple[Tensor, Tensor]] = _factors  # returns the matrices A and B of a layer

    def __call__(self, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.deferred:
            return output
        a, b = self.factors(layer)
        return output + F.linear(F.linear(inputs[0], a), b) * self.scale


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_a, layer.lora_b


def weight_of(layer: Any) -> Tensor:
    """Return the weight of a layer. If the layer has an adapter, return W + (alpha / rank) B A, which has gradients. Pure."""
    if not hasattr(layer, "adapter"):
        return layer.weight  # type: ignore[no-any-return]
    return layer.weight + layer.lora_b @ layer.lora_a * layer.adapter.scale  # type: ignore[no-any-return]


def _add(layer: Any, a: Tensor, b: Tensor, scale: float) -> None:
    layer.lora_a, layer.lora_b, layer.adapter = nn.Parameter(a), nn.Parameter(b), Adapter(scale)
    layer.register_forward_hook(layer.adapter)


def attach_like(template: nn.Module, model: nn.Module) -> None:
    """Add an adapter with empty matrices to each layer of `template` whose namesake in `model` has an adapter. Independent."""
    for name, layer in model.named_modules():
        if isinstance(adapter := getattr(layer, "adapter", None), Adapter):
            _add(template.get_submodule(name), torch.empty(0), torch.empty(0), adapter.scale)


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

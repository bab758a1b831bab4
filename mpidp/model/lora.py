"""LoRA, low-rank adapters (Hu 2021, section 4.1). A layer W x becomes W x + (alpha / rank) B A x. Only A and B are trained.

A has the shape (rank, inputs). Its elements are drawn uniformly from +-1/sqrt(inputs). These values depend only on the seed
and the layer's name. B has the shape (outputs, rank), and is initially zero. A and B are the parameters `lora_a` and `lora_b`
of the layer, which keeps its name. Pure torch, no MPI.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpidp.model.adapter_sizes import A, B, adapter_sizes
from mpidp.model.shape import shapes_of


def is_adapter(name: str) -> bool:
    """Return whether the parameter `name` belongs to an adapter. Pure."""
    return name.endswith((A, B))


def saved_names(names: Sequence[str]) -> list[str]:
    """Return the names of the parameters that a checkpoint contains. These are the adapters in `names`, or all `names` if there
    are no adapters. Pure."""
    return [name for name in names if is_adapter(name)] or list(names)


def attach(model: nn.Module, rank: int, alpha: float, targets: str, seed: int) -> None:
    """Add adapters to the layers that `targets` names, and freeze all other parameters. model: a model, or a part of a
    Transformer. Independent.

    rank: the rank of an adapter, model.lora_rank. targets: see adapter_sizes(). Raises UsageError if a name in
    `targets` matches no layer, or if `rank` exceeds the smaller dimension of a layer that gets an adapter.
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
            nn.init.uniform_(a, -1 / math.sqrt(a.shape[1]), 1 / math.sqrt(a.shape[1]), generator=generator)
        if part is not None:
            a, b = (one[part.box(name + key, tuple(one.shape))].clone() for key, one in ((A, a), (B, b)))
        _add(layer, a.to(layer.weight.device), b.to(layer.weight.device), alpha / rank)


class Adapter:
    """Forward hook of a layer. It adds the adapter's output to the layer's output. The hook is the layer's attribute `adapter`.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.linear: Callable[[Tensor, Tensor], Tensor] = F.linear
        self.factors: Callable[[Any], Sequence[Tensor]] = lambda layer: (layer.lora_a, layer.lora_b)

    def __call__(self, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        a, b = self.factors(layer)
        return output + self.linear(self.linear(inputs[0], a), b) * self.scale


def weight_of(layer: Any) -> Tensor:
    """Return the weight of a layer. If the layer has an adapter, return W + (alpha / rank) B A, through which gradients reach
    A and B. Pure."""
    has_adapter = hasattr(layer, "adapter")
    return layer.weight + layer.lora_b @ layer.lora_a * layer.adapter.scale if has_adapter else layer.weight  # type: ignore[no-any-return]


def _add(layer: Any, a: Tensor, b: Tensor, scale: float) -> None:
    layer.lora_a, layer.lora_b, layer.adapter = nn.Parameter(a), nn.Parameter(b), Adapter(scale)
    layer.register_forward_hook(layer.adapter)


def attach_like(template: nn.Module, model: nn.Module) -> None:
    """Add an adapter with empty matrices to each layer of `template` if the layer with the same name in `model` has an
    adapter. Independent."""
    for name, layer in model.named_modules():
        if hasattr(layer, "adapter"):
            _add(template.get_submodule(name), torch.empty(0), torch.empty(0), cast(Any, layer).adapter.scale)


@torch.no_grad()
def merged(state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return the model's parameters with the adapters merged into them, under the base model's names. A weight W with an adapter
    becomes W + (alpha / rank) B A, in float32.

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

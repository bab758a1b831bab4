"""LoRA, low-rank adapters (Hu 2021, section 4.1). A layer W x becomes W x + (alpha / rank) B A x. Only A and B are trained.

A has the shape (rank, inputs). Its elements are drawn uniformly from +-1/sqrt(inputs). They depend only on the seed and the
layer's name. B has the shape (outputs, rank), and is initially zero. A and B are the parameters `lora_a` and `lora_b` of the
layer, which keeps its name. Pure torch, no MPI.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpidp.errors import UsageError

A, B = ".lora_a", ".lora_b"
ALL = {"q", "k", "v", "o", "gate", "up", "down"}  # the default of model.lora_targets


def is_adapter(name: str) -> bool:
    """Return whether the parameter `name` belongs to an adapter. Pure."""
    return name.endswith((A, B))


def saved_names(names: Sequence[str]) -> list[str]:
    """Return the names of the parameters that a checkpoint contains. These are the adapters in `names`, or all `names` if there
    are no adapters. Pure."""
    return [name for name in names if is_adapter(name)] or list(names)


def adapters_of(layers: Mapping[str, Sequence[int]], rank: int, targets: str) -> list[str]:
    """Return the names of the layers that get adapters. A layer gets an adapter if `targets` has the last component of its name.
    An example of `targets` is "q,v". The default of `targets` names all layers of a block. Names in this default that the model
    does not have are ignored.

    layers: the shape (outputs, inputs) of each layer, by name. Raises UsageError if a name in `targets` matches no layer, or if
    the rank exceeds the smaller dimension of a layer that gets an adapter. Pure.
    """
    wanted, known = {part.strip() for part in targets.split(",") if part.strip()}, {name.rpartition(".")[2] for name in layers}
    wanted = wanted & known if wanted == ALL else wanted
    if not wanted or wanted - known:
        unknown = ", ".join(sorted(wanted - known))
        problem = f"{unknown}, which this model does not have" if unknown else "no layer"
        raise UsageError(f"model.lora_targets={targets} names {problem}. Use some of its layers: {', '.join(sorted(known))}")
    found = [name for name in layers if name.rpartition(".")[2] in wanted]
    for name in found:
        if rank > min(layers[name]):
            raise UsageError(
                f"model.lora_rank={rank} exceeds the smaller dimension of {name} ({' x '.join(map(str, layers[name]))}), so "
                f"the adapter would be larger than the layer. Use at most {min(layers[name])}, or other model.lora_targets"
            )
    return found


def attach(model: nn.Module, rank: int, alpha: float, targets: str, seed: int) -> None:
    """Add adapters to the layers that `targets` names, and freeze all other parameters. Independent.

    targets: see adapters_of(). Raises UsageError if a name in `targets` matches no layer, or if the rank exceeds the smaller
    dimension of such a layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = adapters_of({name: layer.weight.shape for name, layer in layers.items()}, rank, targets)
    model.requires_grad_(False)
    for name in names:
        layer = layers[name]
        outputs, inputs = layer.weight.shape
        a = torch.empty(rank, inputs)
        if not layer.weight.is_meta:
            key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
            nn.init.uniform_(a, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
        where = layer.weight.device
        layer.lora_a, layer.lora_b = nn.Parameter(a.to(where)), nn.Parameter(torch.zeros(outputs, rank, device=where))
        layer.register_forward_hook(_Add(alpha / rank))


class _Add:
    """Forward hook of a layer. It adds the adapter's output to the layer's output."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(inputs[0], layer.lora_a), layer.lora_b) * self.scale


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

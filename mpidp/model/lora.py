"""Low-rank adapters (Hu 2021, section 4.1), put on from outside: a layer W x becomes W x + (alpha / rank) B A x, and of it A
and B alone are trained.

A: (rank, inputs), uniform in +-1/sqrt(inputs) as torch draws a layer, from (seed, name) on the CPU; B: (outputs, rank), zero: so
the model begins as the base, and what one layer draws does not depend on which others have adapters. They are parameters
`lora_a` and `lora_b` of the layer, whose own name stays. Pure torch; it knows nothing of MPI.
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


def is_adapter(name: str) -> bool:
    """Is a parameter of this name a part of an adapter? Pure."""
    return name.endswith((A, B))


def saved_names(names: Sequence[str]) -> list[str]:
    """Of a model's parameters those that a checkpoint holds: the adapters where there are any, else all. Pure."""
    return [name for name in names if is_adapter(name)] or list(names)


def adapters_of(layers: Mapping[str, Sequence[int]], rank: int, targets: str) -> list[str]:
    """Of layers (outputs, inputs) by name those that have adapters: whose last name is among targets ("q,v"). UsageError when
    there is no such layer, or the rank is more than the smaller side of one. Pure."""
    wanted, known = {word.strip() for word in targets.split(",") if word.strip()}, {name.rpartition(".")[2] for name in layers}
    if not wanted or wanted - known:
        what = ", ".join(sorted(wanted - known)) or "nothing"
        raise UsageError(f"model.lora_targets={targets} names {what}: this model's layers are {', '.join(sorted(known))}")
    found = [name for name in layers if name.rpartition(".")[2] in wanted]
    for name in found:
        if rank > min(layers[name]):
            raise UsageError(
                f"model.lora_rank={rank} is more than the smaller side of {name} ({' x '.join(map(str, layers[name]))}): an "
                f"adapter would be larger than the layer; give {min(layers[name])} at most, or other model.lora_targets"
            )
    return found


def attach(model: nn.Module, rank: int, alpha: float, targets: str, seed: int) -> None:
    """Put adapters on layers, and train nothing else. UsageError (adapters_of). Independent."""
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
    """What an adapter adds to its layer's output."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(inputs[0], layer.lora_a), layer.lora_b) * self.scale


@torch.no_grad()
def merged(state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The plain model that a model with adapters is, by the base's names: W + (alpha / rank) B A, in float32. state: all
    parameters by name. ValueError for an adapter without its layer. Pure."""
    found = {name: tensor for name, tensor in state.items() if not is_adapter(name)}
    for name, a in state.items():
        if name.endswith(A):
            layer = name.removesuffix(A)
            if f"{layer}.weight" not in found or layer + B not in state:
                raise ValueError(f"{name} is an adapter of no layer: {layer}.weight and {layer}{B} are wanted")
            update = state[layer + B].float() @ a.float()
            found[f"{layer}.weight"] = found[f"{layer}.weight"].float() + update * (alpha / a.shape[0])
    return found

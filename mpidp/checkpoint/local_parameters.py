"""The parameters that a rank holds. A rank holds either whole parameters, or only boxes of parameters
(strategies/gathered.py). A box is a range of indices in each dimension."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from mpidp.checkpoint.boxes import tensor_of
from mpidp.checkpoint.entry import Entry
from mpidp.model.lora import saved_names


class Shards(Protocol):
    """The type of a parameter's attribute `shards`. A parameter has this attribute if each rank stores only a part of the
    parameter. The tensor of the parameter itself may then be empty."""

    def entries(self, name: str) -> dict[str, Entry]:
        """Return this rank's boxes (rectangular blocks) of the parameter `name`. The boxes are named NAME#0, NAME#1 and so on.
        Independent."""

    def whole(self) -> Tensor:
        """Return the whole parameter. Collective over the ranks that hold shards of the parameter."""


def _shards_of(p: Tensor) -> Shards | None:
    return getattr(p, "shards", None)


def parameters_of(model: torch.nn.Module) -> dict[str, Entry]:
    """Return {name: entry} of the parameters to save. With LoRA, only the adapters are saved, because the base model does not
    change. Independent."""
    found, saved = dict(model.named_parameters()), dict[str, Entry]()
    for name in saved_names(list(found)):
        shards = _shards_of(found[name])
        saved |= {name: Entry(found[name].detach())} if shards is None else shards.entries(name)
    return saved


def whole(p: Tensor) -> Tensor:
    """Return the whole parameter `p`. Collective over the ranks that hold shards of `p`, if there are any. Otherwise
    Independent."""
    shards = _shards_of(p)
    return p.detach() if shards is None else shards.whole()


def weights_sha256(model: torch.nn.Module) -> str:
    """Return the sha256 of the values of all parameters, as little-endian float32 in the order of names. Shards are gathered
    one parameter at a time. Collective over the ranks that hold shards, if any."""
    digest = hashlib.sha256()
    for _, p in sorted(model.named_parameters()):
        digest.update(whole(p).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def boxes_held(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """Return the entries that are boxes (rectangular blocks) of sharded tensors, as {tensor's name: {box's name: entry}}.
    Pure."""
    found: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        if entry.shape is not None and entry.layout == "sharded":
            found.setdefault(tensor_of(key), {})[key] = entry
    return found


def load_boxes(state: Mapping[str, Tensor], held: Mapping[str, Entry], optimizer: Any) -> None:
    """Copy loaded optimizer state into the optimizer: the boxes (rectangular blocks of tensors) into the tensors of `held`,
    and the step counter into `optimizer`. `state`: {name: loaded value}. `held`: {name: entry with the tensor to fill}. Raises
    ValueError if a name in `state` belongs to no parameter. Independent."""
    for name, value in state.items():
        if name.endswith("/step"):
            optimizer.set_updates(int(value))
        elif name in held:
            held[name].tensor.copy_(value.view_as(held[name].tensor))
        else:
            raise ValueError(f"optimizer state {name!r} belongs to no parameter of this model")


def bytes_by_use(**tensors: Iterable[Tensor]) -> dict[str, int]:
    """Return {NAME: bytes of memory that the tensors occupy} for the arguments NAME=tensors. Memory that several tensors of one
    argument share is counted once. Independent."""
    return {
        what: sum({s.data_ptr(): s.nbytes() for t in some if (s := t.untyped_storage()).nbytes()}.values())
        for what, some in tensors.items()
    }

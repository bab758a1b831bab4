"""The parameters that a rank holds: complete parameters, or shards of parameters (strategies/sharded.py). FSDP2 stores shards as
DTensors that are split along dimension 0. This module does not import torch.distributed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mpidp.checkpoint.boxes import tensor_of
from mpidp.checkpoint.entry import Entry
from mpidp.model.lora import saved_names


def shard_rows(rows: int, rank: int, size: int) -> range:
    """Return the rows of dimension 0 that a rank holds. Each rank holds ceil(rows / size) rows, except that the last ranks may
    hold fewer rows or none. Pure."""
    each = -(-rows // size)
    return range(min(rows, rank * each), min(rows, (rank + 1) * each))


def reshard_all(model: torch.nn.Module) -> None:
    """Free the memory of gathered parameters, so that each rank holds only its shards. Independent."""
    for module in model.modules():
        reshard: Any = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()


def shard_of(p: Tensor) -> Entry:
    """Return this rank's shard of a parameter, or of a tensor that is sharded like a parameter. Independent."""
    tensor: Any = p.detach()
    if not hasattr(tensor, "to_local"):
        return Entry(tensor)
    mesh = tensor.device_mesh
    rows = shard_rows(tensor.shape[0], mesh.get_local_rank(), mesh.size())
    return Entry(tensor.to_local(), "sharded", (rows.start,) + (0,) * (tensor.dim() - 1), tuple(tensor.shape))


def parameters_of(model: torch.nn.Module) -> dict[str, Entry]:
    """Return the parameters to save, by name. With LoRA these are only the adapters, because the base model does not change.
    Independent."""
    reshard_all(model)
    found = dict(model.named_parameters())
    return {name: shard_of(found[name]) for name in saved_names(list(found))}


def whole(p: Tensor) -> Tensor:
    """Return the whole parameter. Collective over the ranks that hold shards of the parameter."""
    tensor: Any = p.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def weights_sha256(model: torch.nn.Module) -> str:
    """Return the sha256 of the float32 parameters, in order of their names, as little-endian bytes. Shards are gathered one
    parameter at a time. Collective over the ranks that hold shards, if there are shards."""
    reshard_all(model)  # otherwise NumPy's view would keep a gathered parameter in memory
    digest = hashlib.sha256()
    for _, p in sorted(model.named_parameters()):
        digest.update(whole(p).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def boxes_held(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """Return the sharded entries as {tensor's name: {box's name: entry}}. Pure."""
    found: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        if entry.shape is not None and entry.layout == "sharded":
            found.setdefault(tensor_of(key), {})[key] = entry
    return found


def load_boxes(state: Mapping[str, Tensor], held: Mapping[str, Entry], optimizer: Any) -> None:
    """Copy loaded boxes of optimizer state into the tensors of `held`. Raises ValueError if an entry of `state` belongs to no
    parameter. Independent."""
    for name, value in state.items():
        if name.endswith("/step"):
            optimizer.set_updates(int(value))
        elif name in held:
            held[name].tensor.copy_(value.view_as(held[name].tensor))
        else:
            raise ValueError(f"optimizer state {name!r} belongs to no parameter of this model")


def bytes_by_use(**tensors: Iterable[Tensor]) -> dict[str, int]:
    """Return the bytes of memory that the tensors of each use occupy. Memory that several tensors share is counted once.
    Independent."""
    return {
        what: sum({s.data_ptr(): s.nbytes() for t in some if (s := t.untyped_storage()).nbytes()}.values())
        for what, some in tensors.items()
    }

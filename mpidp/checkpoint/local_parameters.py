"""What a rank holds of a model's parameters: all of them, or its shards (strategies/sharded.py), which torch's FSDP2 keeps as
DTensors cut along dim 0. Nothing here imports torch.distributed."""

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
    """The rows of dim 0 that a rank holds: ceil(rows / size) each, the last ranks less or nothing. Pure."""
    each = -(-rows // size)
    return range(min(rows, rank * each), min(rows, (rank + 1) * each))


def reshard_all(model: torch.nn.Module) -> None:
    """Every rank holds its shards alone. Independent."""
    for module in model.modules():
        reshard: Any = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()


def shard_of(p: Tensor) -> Entry:
    """This rank's part of a parameter, or of a tensor that is cut as it. Independent."""
    parted: Any = p.detach()
    if not hasattr(parted, "to_local"):
        return Entry(parted)
    mesh = parted.device_mesh
    rows = shard_rows(parted.shape[0], mesh.get_local_rank(), mesh.size())
    return Entry(parted.to_local(), "sharded", (rows.start,) + (0,) * (parted.dim() - 1), tuple(parted.shape))


def parameters_of(model: torch.nn.Module) -> dict[str, Entry]:
    """By name; of a model with adapters these alone: its base never changes, and is not saved again. Independent."""
    reshard_all(model)
    found = dict(model.named_parameters())
    return {name: shard_of(found[name]) for name in saved_names(list(found))}


def whole(p: Tensor) -> Tensor:
    """All of a parameter. Collective over the ranks that hold shards of it."""
    parted: Any = p.detach()
    return parted.full_tensor() if hasattr(parted, "full_tensor") else parted  # type: ignore[no-any-return]


def weights_sha256(model: torch.nn.Module) -> str:
    """sha256 over the float32 parameters in name order, little-endian bytes; of shards too, a parameter at a time. Collective
    over the ranks that hold shards, if there are any."""
    reshard_all(model)  # numpy's view of a gathered parameter would keep its memory
    digest = hashlib.sha256()
    for _, p in sorted(model.named_parameters()):
        digest.update(whole(p).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def boxes_held(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """By tensor, those of the entries that are boxes of it. Pure."""
    found: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        if entry.shape is not None and entry.layout == "sharded":
            found.setdefault(tensor_of(key), {})[key] = entry
    return found


def load_boxes(state: Mapping[str, Tensor], mine: Mapping[str, Entry], optimizer: Any) -> None:
    """Put boxes of an optimizer's state in their places. ValueError for an entry of no parameter. Independent."""
    for name, value in state.items():
        if name.endswith("/step"):
            optimizer.set_updates(int(value))
        elif name in mine:
            mine[name].tensor.copy_(value.view_as(mine[name].tensor))
        else:
            raise ValueError(f"optimizer state {name!r} of no parameter of this model")


def bytes_by_use(**tensors: Iterable[Tensor]) -> dict[str, int]:
    """The memory under tensors, each once, by what it is for. Independent."""
    return {
        what: sum({s.data_ptr(): s.nbytes() for t in some if (s := t.untyped_storage()).nbytes()}.values())
        for what, some in tensors.items()
    }

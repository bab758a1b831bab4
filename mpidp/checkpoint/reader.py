"""Reads the tensors of a checkpoint. A box is a range of indices in each dimension of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from mpidp.checkpoint.boxes import Box, tensor_of
from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.manifest import read_manifest, readable
from mpidp.errors import CheckpointError


class Reader(Mapping[str, Tensor]):
    """The global tensors of a checkpoint, by name. The files are read when a tensor is accessed. Independent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta = read_manifest(path)
        self._pieces: dict[str, list[tuple[str, str, Box]]] = {}  # for each tensor: (file, name in the file, box) of its boxes
        with readable(path):
            self._pieces |= {name: [] for name in self.meta["tensors"]}
            self.num_bytes = sum(int(record["bytes"]) for record in self.meta["files"])  # total size of the files
            for record in self.meta["files"]:
                for key, box in record["pieces"].items():
                    self._pieces[tensor_of(key)].append((record["file"], key, box))

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, name: str) -> Tensor:
        """Return the whole tensor. If its layout is additive, each rank stored one summand of the tensor. In this case, add
        the summands in the order of ranks, and return the sum. Raises CheckpointError if a piece is missing."""
        return self.part(name)

    def part(self, name: str, at: Sequence[int] = (), shape: Sequence[int] | None = None) -> Tensor:
        """Return the box (rectangular block) of the tensor `name` that begins at the indices `at` and has the shape `shape`.
        By default, return the whole tensor. Only the box is read. Raises CheckpointError if elements of the box are
        missing."""
        with readable(self.path):
            whole = tuple(self.meta["tensors"][name]["shape"])
            return self._assembled(name, self._pieces[name], tuple(at) or (0,) * len(whole), whole if shape is None else shape)

    def box(self, name: str, entry: Entry) -> Tensor:
        """Return the box (rectangular block) of the tensor `name` that `entry` describes. Raises CheckpointError if the tensor
        does not have the global shape of `entry`, or if elements of the box are missing."""
        with readable(self.path):
            there, shape = tuple(self.meta["tensors"][name]["shape"]), entry.tensor.shape if entry.shape is None else entry.shape
            if there != tuple(shape):
                raise CheckpointError(f"{self.path}: {name} has shape {there} in the checkpoint, but {tuple(shape)} in this "
                                      "model")
        return self.part(name, entry.place, entry.tensor.shape) if entry.tensor.numel() else torch.empty_like(entry.tensor)

    def _assembled(self, name: str, pieces: Iterable[tuple[str, str, Box]], at: Sequence[int], shape: Sequence[int]) -> Tensor:
        about = self.meta["tensors"][name]
        dtype = getattr(torch, about["dtype"])
        if not 0 <= math.prod(about["shape"]) * dtype.itemsize <= self.num_bytes:
            raise ValueError(f"{name}: shape {about['shape']} does not fit in {self.num_bytes} bytes")
        found = torch.zeros(tuple(shape), dtype=dtype)
        filled = 0
        for file, key, box in pieces:
            if any(not 0 <= start <= stop <= length for (start, stop), length in zip(box, about["shape"], strict=True)):
                raise ValueError(f"{name}: the index ranges {box} are outside the shape {about['shape']}")
            ranges = [(max(start, a), min(stop, a + length)) for (start, stop), a, length in zip(box, at, shape, strict=True)]
            if any(low >= high for low, high in ranges) and found.numel():
                continue
            with safetensors.safe_open(self.path / file, "pt") as opened:
                if box == [list(one) for one in ranges]:
                    piece = opened.get_tensor(key)
                else:
                    inside = [slice(low - start, high - start) for (low, high), (start, _) in zip(ranges, box, strict=True)]
                    piece = opened.get_slice(key)[tuple(inside)]
            place = found[tuple(slice(low - a, high - a) for (low, high), a in zip(ranges, at, strict=True))]
            if about["layout"] == "additive":
                place += piece
            else:
                place.copy_(piece)
            filled += piece.numel()
        if about["layout"] != "additive" and filled != found.numel():
            raise CheckpointError(f"{self.path}: {name} is incomplete: the files hold {filled} of {found.numel()} elements")
        return found

    def under(
        self, prefix: str, rank: int = 0, size: int = 1, boxes: Mapping[str, Mapping[str, Entry]] | None = None
    ) -> dict[str, Tensor]:
        """Return {name without prefix: tensor} for all tensors whose names begin with `prefix`. Each tensor is the result of
        own() for `rank` and `size`.

        `boxes`: the tensors of which this rank holds only some boxes (rectangular blocks), as {tensor's name: {box's name:
        entry}}, without prefix. For each of these tensors, only the boxes are read, and the result contains {box's name: box}.
        """
        found = {}
        for name in (name for name in self if name.startswith(prefix)):
            held = (boxes or {}).get(name.removeprefix(prefix))
            if held is None:
                found[name.removeprefix(prefix)] = self.own(name, rank, size)
            else:
                found |= {key: self.box(name, entry) for key, entry in held.items()}
        return found

    def own(self, name: str, rank: int, size: int) -> Tensor:
        """Return the tensor `name` for the rank `rank` of a run with `size` ranks. If the layout of the tensor is not
        additive, return the whole tensor. If the layout is additive, each rank stored one summand. In this case, if `size`
        ranks wrote the checkpoint, return the summand of rank `rank`. Otherwise return the sum for rank 0, and zeros for other
        ranks."""
        pieces, about = self._pieces[name], self.meta["tensors"][name]
        if about["layout"] == "additive":  # own summand if as many ranks wrote the tensor; else rank 0 gets the sum
            pieces = pieces[rank : rank + 1] if len(pieces) == size else pieces if rank == 0 else []
        with readable(self.path):
            return self._assembled(name, pieces, (0,) * len(about["shape"]), about["shape"])

"""Divides the global tensors of a checkpoint into boxes. A box is a range of indices in each dimension of a tensor. If several
ranks hold the same tensors, each rank writes only some of the boxes. A rank writes all its boxes to one safetensors file."""

from __future__ import annotations

import itertools
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpidp.checkpoint.entry import Entry

SYNC_BYTES = 64 << 20  # call fdatasync whenever this many bytes have been written, so that the disk writes a large file steadily
DTYPES = {  # the names of dtypes in safetensors files
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}

Box = list[list[int]]  # [start, stop) along each dimension; empty for a scalar


def tensor_of(key: str) -> str:
    """Return the name of the tensor to which the box (rectangular block) named `key` belongs. If a tensor NAME has one box,
    the box is also named NAME. If the tensor has several boxes, they are named NAME#0, NAME#1 and so on. Pure."""
    return key.partition("#")[0]


def boxes_of_run(shape: tuple[int, ...], low: int, high: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Divide the elements [low, high) of a tensor, counted in row-major order, into boxes (rectangular blocks). Return one
    pair per box: (indices of its first element, shape of the box).

    A range of a matrix gives at most three boxes: the end of one row, complete rows, and the beginning of another row. Pure.
    """
    if low >= high:
        return []
    if len(shape) <= 1:
        return [((low,), (high - low,)) if shape else ((), ())]
    row = math.prod(shape[1:])
    first, last = -(-low // row), high // row  # the complete rows are [first, last)

    def inside(number: int, start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        found = boxes_of_run(shape[1:], start - number * row, stop - number * row)
        return [((number, *at), (1, *size)) for at, size in found]

    if first > last:
        return inside(last, low, high)
    rows = [((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))] if first < last else []
    return [*inside(first - 1, low, first * row), *rows, *inside(last, last * row, high)]


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (number of rows along dimension 0, number of elements per row) of a tensor. A scalar has one row."""
    return shape[0] if shape else 1, math.prod(shape[1:])


def share_out(shapes: Mapping[str, tuple[int, ...]], rank: int, size: int) -> dict[str, tuple[int, int]]:
    """Divide the rows of tensors among `size` ranks, each of which holds all tensors. Return {tensor's name: (start, stop)}:
    the rank with index `rank` writes the rows [start, stop) of the tensor. Each rank writes about 1/size of all elements. Each
    row is written by exactly one rank. `shapes`: {tensor's name: shape}. Pure."""
    total = sum(rows * elements for rows, elements in map(_rows, shapes.values()))
    low, high = rank * total // size, (rank + 1) * total // size
    share, offset = {}, 0
    for name in sorted(shapes):
        rows, elements = _rows(shapes[name])
        start, stop = (min(rows, max(0, -(-(edge - offset) // max(1, elements)))) for edge in (low, high))
        if start < stop:
            share[name] = (start, stop)
        offset += rows * elements
    return share


@dataclass(frozen=True)
class Piece:
    """A box (rectangular block) of a global tensor. This rank writes the box to its file. `at`: the indices of the box's first
    element in the global tensor. `tensor`: the values of the box."""

    name: str  # name in the file: the tensor's name, or NAME#0, NAME#1, ... for several boxes of a tensor
    tensor: Tensor
    at: tuple[int, ...]

    @property
    def box(self) -> Box:
        """The box in the form that manifests store: one pair [start, stop] per dimension. The index `stop` is excluded."""
        return [[start, start + length] for start, length in zip(self.at, self.tensor.shape, strict=True)]


def pieces_of(entries: Mapping[str, Entry], share: tuple[int, int] | None) -> list[Piece]:
    """Return the pieces (boxes with their values) that this rank writes, in the order of its file.

    `share`: (index of this rank, number of ranks) among the ranks that write the replicated tensors, or None if this rank
    writes no replicated tensors. A rank always writes all its sharded and additive entries. Independent.
    """
    found = []
    replicated = {name: tuple(e.tensor.shape) for name, e in entries.items() if e.layout == "replicated"}
    for name, (start, stop) in (share_out(replicated, *share) if share else {}).items():
        tensor, at = entries[name].tensor.detach(), entries[name].place
        found.append(Piece(name, tensor[start:stop], (at[0] + start, *at[1:])) if at else Piece(name, tensor, at))
    for name, entry in entries.items():
        if entry.layout != "replicated" and (entry.shape is None or entry.tensor.numel()):
            found.append(Piece(name, entry.tensor.detach(), entry.place))
    # Sort the pieces by element size, so that each piece is aligned to its element size.
    return sorted(found, key=lambda piece: (-piece.tensor.element_size(), piece.name))


def describe(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return the shape, dtype and layout of each tensor, in the form that manifests store: {tensor's name: {shape, dtype,
    layout}}. Independent."""
    return {
        tensor_of(name): {
            "shape": list(e.shape if e.shape is not None else e.tensor.shape),
            "dtype": str(e.tensor.dtype).removeprefix("torch."), "layout": e.layout,
        }
        for name, e in entries.items()
    }


def write_pieces(path: Path, pieces: Sequence[Piece], blocks: Iterable[memoryview]) -> tuple[int, int]:
    """Write a safetensors file and fsync it. Return (size in bytes, crc32).

    `blocks`: the bytes of all pieces, in the order of `pieces`. If a write fails, removes the incomplete file and raises OSError,
    which names the file. Independent.
    """
    about: dict[str, Any] = {}
    offset = 0
    for piece in pieces:
        dtype, end = DTYPES[piece.tensor.dtype], offset + piece.tensor.nbytes
        about[piece.name] = {"dtype": dtype, "shape": list(piece.tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(about).encode()
    text += b" " * (-len(text) % 8)
    size = crc = 0
    try:
        with open(path, "wb", buffering=0) as file:
            for block in itertools.chain([memoryview(len(text).to_bytes(8, "little") + text)], blocks):
                length = len(block)
                size, crc = size + length, zlib.crc32(block, crc)
                while len(block):
                    block = block[file.write(block) :]
                if size // SYNC_BYTES > (size - length) // SYNC_BYTES:
                    os.fdatasync(file.fileno())
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            path.unlink()  # free the space for other files
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    return size, crc

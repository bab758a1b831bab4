"""What is written of global tensors: boxes of them, shared out among those that hold the same, in safetensors files."""

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

SYNC_BYTES = 64 << 20  # go to the disk before more is written, so that a long file comes further all the time
DTYPES = {  # as safetensors calls them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}

Box = list[list[int]]  # [start, stop) along each dimension; nothing of a scalar


def tensor_of(key: str) -> str:
    """The tensor of which `key` is a box: where a rank holds several boxes of one tensor they are name#0, name#1, ... Pure."""
    return key.partition("#")[0]


def boxes_of_run(shape: tuple[int, ...], low: int, high: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements [low, high) of a tensor of this shape, in row-major order, as boxes (from which indices on, how large) in that
    order: of a matrix a first row in part, whole rows, a last row in part, where there are such. Pure."""
    if low >= high:
        return []
    if len(shape) <= 1:
        return [((low,), (high - low,)) if shape else ((), ())]
    row = math.prod(shape[1:])
    first, last = -(-low // row), high // row  # whole rows

    def inside(number: int, start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        found = boxes_of_run(shape[1:], start - number * row, stop - number * row)
        return [((number, *at), (1, *size)) for at, size in found]

    if first > last:
        return inside(last, low, high)
    rows = [((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))] if first < last else []
    return [*inside(first - 1, low, first * row), *rows, *inside(last, last * row, high)]


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows along dim 0, elements a row); a scalar is one row."""
    rows = shape[0] if shape else 1
    elements = 1
    for length in shape[1:]:
        elements *= length
    return rows, elements


def share_out(shapes: Mapping[str, tuple[int, ...]], rank: int, size: int) -> dict[str, tuple[int, int]]:
    """Which rows [start, stop) of each replicated tensor writer `rank` of `size` writes: about 1/size of all elements, each row
    once. Pure."""
    total = sum(rows * elements for rows, elements in map(_rows, shapes.values()))
    low, high = rank * total // size, (rank + 1) * total // size
    mine, offset = {}, 0
    for name in sorted(shapes):
        rows, elements = _rows(shapes[name])
        start, stop = (min(rows, max(0, -(-(edge - offset) // max(1, elements)))) for edge in (low, high))
        if start < stop:
            mine[name] = (start, stop)
        offset += rows * elements
    return mine


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor, from the indices `at` on, as large as `tensor`: what one rank writes of it."""

    name: str  # in its file: the tensor's, or tensor#0, tensor#1, ... where the rank writes several boxes of it
    tensor: Tensor
    at: tuple[int, ...]

    @property
    def box(self) -> Box:
        """As a manifest has it."""
        return [[start, start + length] for start, length in zip(self.at, self.tensor.shape, strict=True)]


def pieces_of(entries: Mapping[str, Entry], share: tuple[int, int] | None) -> list[Piece]:
    """What this rank writes, in the order of its file: part share[0] of share[1] of what all ranks hold (None: nothing of that),
    and whatever it alone holds. Independent."""
    found = []
    replicated = {name: tuple(e.tensor.shape) for name, e in entries.items() if e.layout == "replicated"}
    for name, (start, stop) in (share_out(replicated, *share) if share else {}).items():
        tensor, at = entries[name].tensor.detach(), entries[name].place
        found.append(Piece(name, tensor[start:stop], (at[0] + start, *at[1:])) if at else Piece(name, tensor, at))
    for name, entry in entries.items():
        if entry.layout != "replicated" and (entry.shape is None or entry.tensor.numel()):
            found.append(Piece(name, entry.tensor.detach(), entry.place))
    return sorted(found, key=lambda piece: (-piece.tensor.element_size(), piece.name))  # each at a multiple of its element's size


def describe(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The tensors of entries as a manifest has them. Independent."""
    return {
        tensor_of(name): {
            "shape": list(e.shape if e.shape is not None else e.tensor.shape),
            "dtype": str(e.tensor.dtype).removeprefix("torch."), "layout": e.layout,
        }
        for name, e in entries.items()
    }


def write_pieces(path: Path, pieces: Sequence[Piece], blocks: Iterable[memoryview]) -> tuple[int, int]:
    """A safetensors file of pieces whose bytes, in their order, are the blocks: (bytes, crc32 of it), once it is on the disk.
    The interpreter is free for other threads meanwhile. OSError names the file, and nothing is left of it. Independent."""
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
            path.unlink()  # others may need the room
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    return size, crc

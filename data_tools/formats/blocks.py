"""Blocks of tokens. The readers of all formats yield blocks, and the writers of all formats take blocks. A block is only a
part of a file, so the memory use does not grow with the file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpidp.errors import DataError
from mpidp.runtime.files import open_regular

BLOCK_TOKENS = 2**18  # approximate number of tokens of a block


@dataclass(frozen=True)
class TokenBlock:
    """Consecutive tokens of a source. The last document of a block may continue in the next block."""

    ids: np.ndarray  # (n,) integers
    starts: np.ndarray | None = None  # (d,) int64, ascending: starts of documents or rows; None: the format does not store them
    mask: np.ndarray | None = None  # (n,) uint8: 1 if the token is in the loss; None: all tokens are in it


@dataclass
class ReadOptions:
    """The options of the readers of all formats. The readers also record counts and remarks for the user in this object."""

    vocab_size: int
    scratch: Path  # a folder for temporary files
    dtype: str = ""  # --dtype: the type of ids if the format does not store it; "": the usual type
    column: str = ""  # --column: the column that holds the ids; "": a column with one of the usual names
    remarks: list[str] = field(default_factory=list)
    skipped: int = 0  # number of documents without tokens
    divided: bool = False  # whether a column, such as segment_ids, divides rows into several documents

    def remark(self, text: str) -> None:
        """Add a remark for the user. A remark that was added before is not added again."""
        if text not in self.remarks:
            self.remarks.append(text)


@dataclass(frozen=True)
class SourcePart:
    """One file or folder of a source. `split`: the split to which it belongs, "train" or "val"."""

    path: Path
    split: str = "train"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Return a context in which an OSError becomes a DataError that names the file. Independent."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror or error}); restore the file") from None


def read_array(path: Path, dtype: Any, offset: int = 0, count: int = -1, unit: str = "tokens") -> Iterator[np.ndarray]:
    """Yield the numbers of a file, as arrays of at most BLOCK_TOKENS numbers.

    `offset`: the position of the first number in the file, in bytes. `count`: how many numbers to read (-1: all). `unit`: what
    the numbers are. Errors name it. Raises DataError if the file cannot be read or is too short. Also raises DataError if
    `count` is -1 and the last number is incomplete. Independent.
    """
    kind = np.dtype(dtype)
    with readable(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size - offset
        if size < 0 or size % kind.itemsize and count < 0:
            advice = ", or give the type of the ids with --dtype" * (unit == "tokens")
            raise DataError(f"{path}: {max(size, 0)} bytes of {unit} are not a multiple of {kind.itemsize} bytes, the size of "
                            f"{kind.name}. Copy the file again{advice}")
        left = size // kind.itemsize if count < 0 else count
        if left * kind.itemsize > size:
            raise DataError(f"{path}: it has {size // kind.itemsize} {unit}, but its header states {left}. Copy the file again")
        file.seek(offset)
        while left:
            piece = np.frombuffer(file.read(min(left, BLOCK_TOKENS) * kind.itemsize), kind)
            if not len(piece):
                raise DataError(f"{path}: the file became shorter while it was read")
            left -= len(piece)
            yield piece


def whole_array(path: Path, dtype: Any, offset: int = 0, count: int = -1, unit: str = "entries") -> np.ndarray:
    """Return the numbers of a file as one array. The parameters and errors are those of read_array. Independent."""
    return np.concatenate([np.empty(0, dtype), *read_array(path, dtype, offset, count, unit)])


def with_starts(pieces: Iterable[tuple[np.ndarray, np.ndarray | None]], starts: np.ndarray) -> Iterator[TokenBlock]:
    """Yield the tokens of one file as blocks. `pieces`: the tokens in order, as pairs (ids, loss mask or None). `starts`: (d,)
    int64, the positions in the file at which documents start. Pure."""
    at = 0
    for ids, mask in pieces:
        low, high = np.searchsorted(starts, [at, at + len(ids)])
        yield TokenBlock(ids, starts[low:high] - at, mask)
        at += len(ids)


def checked_ids(block: TokenBlock, options: ReadOptions, where: object, at: int) -> TokenBlock:
    """Return the block, with its loss mask as uint8. Raises DataError if an id is not one of the tokenizer's ids. `where`: the
    file. `at`: the position of the block in this file. Errors show both. Pure."""
    ids = block.ids
    if not len(ids):
        return block
    if ids.min() < 0 or ids.max() >= options.vocab_size:
        bad = int(np.argmax((ids < 0) | (ids >= options.vocab_size)))
        raise DataError(f"{where}: token {at + bad} has the id {int(ids[bad])}, but the tokenizer's ids are "
                        f"0..{options.vocab_size - 1}. "
                        "Give the tokenizer of these data with --tokenizer PATH, or the type of the ids with --dtype")
    return block if block.mask is None else replace(block, mask=np.asarray(block.mask, dtype=np.uint8))

"""Writes blocks of tokens to raw files (see cut.py), which are temporary. Shards are later written from the raw files. If a
format does not store where documents start, boundaries.py finds the document starts, and replace_documents() stores them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_tools.cut import ADVICE, Raw
from data_tools.formats.blocks import BLOCK_TOKENS, TokenBlock
from mpidp.runtime.files import writing


class BlockWriter:
    """Writes the raw files of one split. By default, a loss mask that is 1 for every token is not stored. All methods raise
    UsageError if a file cannot be written. Independent."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], masked: bool = False) -> None:
        """`masked`: whether to store a loss mask even if it is 1 for every token."""
        self.path, self.dtype = folder / split, dtype
        self.tokens = self.documents = 0
        self.parts: list[int] = []  # position at which each file or folder of the source begins
        self.known: list[bool] = []  # whether each of these files or folders stores document starts
        self.lengths: set[int] = set()  # lengths of rows; at most two different lengths are recorded
        self.left_out = 0  # number of tokens that are not in the loss
        self._ids, self._starts = self._open("tokens"), self._open("documents")
        self._mask = self._open("mask") if masked else None
        self._masked = masked

    def begin_part(self) -> None:
        """Record that the next block is the first of another file or folder of the source."""
        self.parts.append(self.tokens)
        self.known.append(True)

    def add(self, block: TokenBlock) -> None:
        """Append a block. Call begin_part() before the first block."""
        with writing(self.path, ADVICE):
            self._add_mask(block)
            self._ids.write(block.ids.astype(self.dtype).tobytes())
            if block.starts is None:
                self.known[-1] = False
            else:
                self._starts.write((block.starts + self.tokens).astype("<u8").tobytes())
                self.documents += len(block.starts)
                if len(self.lengths) < 2 and len(block.starts):
                    self.lengths |= set(np.unique(np.diff(block.starts, append=len(block.ids)))[:2].tolist())
        self.tokens += len(block.ids)

    def close(self) -> Raw:
        """Close the files, and return a `Raw` object, which reads them."""
        for file in filter(None, (self._ids, self._starts, self._mask)):
            with writing(file.name, ADVICE):
                file.close()
        return self.raw()

    def raw(self) -> Raw:
        """Return a `Raw` object, which reads the files. Call close() before this method."""
        return Raw(self.path, self.dtype.itemsize, self.tokens, self.documents, self._masked or self.left_out > 0)

    def replace_documents(self, pieces: Iterator[np.ndarray]) -> None:
        """Replace the document starts. `pieces`: int64 arrays that contain all new starts, in ascending order."""
        documents = 0
        with writing(self.path, ADVICE), self._open("found") as file:
            for starts in pieces:
                file.write(starts.astype("<u8").tobytes())
                documents += len(starts)
            file.close()
            os.replace(file.name, f"{self.path}.documents")
        self.documents = documents

    def pieces(self, start: int = 0, stop: int = -1) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the tokens [start, stop) as several pairs (position, ids), in order. position: the position of the first token
        of the array `ids` in the split. By default, yield all tokens."""
        raw, end = self.raw(), self.tokens if stop < 0 else stop
        for at in range(start, end, BLOCK_TOKENS):
            yield at, raw.read(at, min(at + BLOCK_TOKENS, end))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the ids of the tokens at `positions`. The positions and the result are arrays (p,)."""
        return np.memmap(f"{self.path}.tokens", self.dtype, mode="r")[positions] if len(positions) else np.empty(0, self.dtype)

    def start_pieces(self) -> Iterator[np.ndarray]:
        """Yield the document starts in ascending order, as several int64 arrays."""
        starts = np.memmap(f"{self.path}.documents", "<u8", mode="r") if self.documents else np.empty(0, "<u8")
        for low in range(0, len(starts), BLOCK_TOKENS):
            yield np.array(starts[low : low + BLOCK_TOKENS]).astype(np.int64)

    def _add_mask(self, block: TokenBlock) -> None:
        if block.mask is None and self._mask is None:
            return
        if self._mask is None:
            self._mask = self._open("mask")
            for at in range(0, self.tokens, BLOCK_TOKENS):
                self._mask.write(bytes([1]) * min(BLOCK_TOKENS, self.tokens - at))
        mask = np.ones(len(block.ids), np.uint8) if block.mask is None else block.mask
        self.left_out += len(mask) - int(np.count_nonzero(mask))
        self._mask.write(mask.tobytes())

    def _open(self, end: str) -> IO[bytes]:
        with writing(f"{self.path}.{end}", ADVICE):
            return open(f"{self.path}.{end}", "wb", buffering=2**20)

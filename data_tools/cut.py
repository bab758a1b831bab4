"""Cuts streams of tokens into shards. Each rank first writes its tokens to raw files, which are temporary files of ids,
document starts and loss mask. Then the shard boundaries are chosen. Each shard is written from the raw files of all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from mpidp.data.index import FileRecord
from mpidp.data.shard_writer import write_shard
from mpidp.data.token_bytes import bytes_of_tokens
from mpidp.data.tokenizer import Tokenizer
from mpidp.errors import DataError, UsageError
from mpidp.runtime.files import writing
from mpidp.runtime.log import counted

ADVICE = "free space on its disk, or choose another --out"
PIECE_TOKENS = 2**20  # number of tokens that are read at a time


class RawWriter:
    """Writes the raw files of one rank for a stream.

    FOLDER/NAME.tokens contains the ids. FOLDER/NAME.documents contains the position of the first token of each document
    (uint64). If there is a loss mask, FOLDER/NAME.mask contains the mask (uint8).
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], masked: bool = False) -> None:
        """Create the files FOLDER/NAME.*. `dtype`: the type of the ids. `masked`: whether there is a loss mask. The other methods
        raise UsageError if a file cannot be written."""
        self.path, self.tokens, self.documents = folder / name, 0, 0
        self._dtype, self._inside = dtype, False
        self._ids = open(f"{self.path}.tokens", "wb", buffering=PIECE_TOKENS)  # noqa: SIM115 - close() closes
        self._starts = open(f"{self.path}.documents", "wb", buffering=PIECE_TOKENS)  # noqa: SIM115
        self._mask = open(f"{self.path}.mask", "wb", buffering=PIECE_TOKENS) if masked else None  # noqa: SIM115

    def add(self, ids: np.ndarray) -> None:
        """Append ids to the current document. If the previous document has ended, start a new one."""
        if not self._inside:
            _write(self._starts, np.array([self.tokens], dtype="<u8"))
            self.documents, self._inside = self.documents + 1, True
        _write(self._ids, ids.astype(self._dtype))
        self.tokens += len(ids)

    def end_document_with(self, ids: np.ndarray) -> None:
        """Append `ids`, which may be empty, and end the document. No end-of-document token is added."""
        self.add(ids)
        self._inside = False

    def add_document(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Append a whole document and its loss mask."""
        assert self._mask is not None
        self.add(ids)
        _write(self._mask, mask.astype(np.uint8))
        self._inside = False

    def close(self) -> Raw:
        """Close the files, and return a `Raw` object, which reads them."""
        for file in filter(None, (self._ids, self._starts, self._mask)):
            with writing(file.name, ADVICE):
                file.close()
        return Raw(self.path, self._dtype.itemsize, self.tokens, self.documents, self._mask is not None)


def _write(file: IO[bytes], values: np.ndarray) -> None:
    with writing(file.name, ADVICE):
        file.write(values.tobytes())


@dataclass(frozen=True)
class Raw:
    """The raw files that one rank wrote for a stream."""

    path: Path  # FOLDER/NAME of the raw files
    token_bytes: int  # bytes per token
    tokens: int
    documents: int
    masked: bool = False

    def read(self, start: int, stop: int, mask: bool = False) -> np.ndarray:
        """Return the ids of the tokens [start, stop), or their loss mask if `mask` is true."""
        if mask:
            return np.fromfile(f"{self.path}.mask", np.uint8, count=stop - start, offset=start)
        dtype = f"<u{self.token_bytes}"
        return np.fromfile(f"{self.path}.tokens", dtype, count=stop - start, offset=start * self.token_bytes)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Return where documents begin among the tokens [start, stop), as uint64 positions."""
        if not self.documents:
            return np.empty(0, dtype="<u8")
        starts = np.memmap(f"{self.path}.documents", dtype="<u8", mode="r")
        first, last = np.searchsorted(starts, np.array([start, stop], dtype="<u8"))
        return np.array(starts[first:last])


@dataclass(frozen=True)
class Stream:
    """A stream of tokens, read from the raw files of all ranks. The stream is the same for any number of ranks."""

    raws: list[Raw]
    bases: list[int] = field(init=False)  # position in the stream of the first token of each raw file
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        ends = np.cumsum([raw.tokens for raw in self.raws]).tolist()
        object.__setattr__(self, "bases", [0, *ends[:-1]])
        object.__setattr__(self, "tokens", ends[-1])

    @property
    def masked(self) -> bool:
        """Whether the stream has a loss mask."""
        return all(raw.masked for raw in self.raws)

    def read(self, start: int, stop: int, mask: bool = False) -> np.ndarray:
        """Return the ids of the tokens [start, stop), or their loss mask if `mask` is true."""
        found = [raw.read(a, b, mask) for raw, _, a, b in self._overlaps(start, stop)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the ids of the tokens [start, stop), as arrays of at most PIECE_TOKENS ids."""
        for at in range(start, stop, PIECE_TOKENS):
            yield self.read(at, min(at + PIECE_TOKENS, stop))

    def masks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the loss mask of the tokens [start, stop), as uint8 arrays of at most PIECE_TOKENS values."""
        for at in range(start, stop, PIECE_TOKENS):
            yield self.read(at, min(at + PIECE_TOKENS, stop), mask=True)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Return where documents begin among the tokens [start, stop), as uint64 positions relative to `start`."""
        found = [raw.document_starts(a, b) + np.uint64(base) for raw, base, a, b in self._overlaps(start, stop)]
        return np.concatenate(found) - np.uint64(start)

    def _overlaps(self, start: int, stop: int) -> Iterator[tuple[Raw, int, int, int]]:
        for raw, base in zip(self.raws, self.bases, strict=True):
            a, b = max(start - base, 0), min(stop - base, raw.tokens)
            if a < b:
                yield raw, base, a, b


@dataclass(frozen=True)
class ShardPlan:
    """The plan of shard number `shard` of a split. The shard contains the tokens [start, stop) of the stream `stream`."""

    split: str
    shard: int
    num_shards: int
    stream: str  # name of the stream
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The file name of the shard."""
        return f"{self.split}_{self.shard:05d}.h5"


class Tokens(Protocol):
    """A stream from which shards are cut. This interface is implemented by Stream, and by Arrangement (arrange.py), which
    arranges the documents of several streams."""

    @property
    def tokens(self) -> int: ...

    @property
    def masked(self) -> bool: ...

    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]: ...

    def masks(self, start: int, stop: int) -> Iterator[np.ndarray]: ...

    def document_starts(self, start: int, stop: int) -> np.ndarray: ...


def plan_shards(streams: Mapping[str, Tokens], shards: int, val_fraction: float, advice: str) -> list[ShardPlan]:
    """Plan the shards of each split. If a split has N tokens and K shards, shard k starts at token k * N // K of the split.

    `streams`: the streams by name. If there is a stream "val", it becomes the validation split. Otherwise the end of "train"
    becomes the validation split: a fraction `val_fraction` of the tokens, but at least 2 tokens (0: no validation split).
    `shards`: the number of training shards. The number of validation shards is in proportion to the size of the validation
    split. `advice`: the options that change the splits, for the error message. Raises DataError if a split is too small, and
    UsageError if there are more shards than tokens.
    """
    total = streams["train"].tokens
    by_document = "val" in streams
    num_val = streams["val"].tokens if by_document else max(2, round(total * val_fraction)) if val_fraction else 0
    num_train = total if by_document else total - num_val
    if num_train < 2 or (by_document and num_val < 2):
        found = counted(total, "training token" if by_document else "token")
        found += f" and {counted(num_val, 'validation token')}" * by_document
        advice = advice if num_train + num_val >= 2 else ""
        raise DataError(f"the source has {found}, but each split needs at least 2 tokens. Give more text{advice}")
    if shards > num_train:
        raise UsageError(f"--shards {shards} is more than {num_train}, the number of training tokens. Choose fewer shards")
    plans = _cut("train", "train", 0, num_train, shards)
    if num_val:
        num_files = min(num_val, max(1, round(shards * num_val / num_train)))
        plans += _cut("val", "val" if by_document else "train", 0 if by_document else num_train, num_val, num_files)
    return plans


def _cut(split: str, stream: str, start: int, tokens: int, num: int) -> list[ShardPlan]:
    cuts = [start + k * tokens // num for k in range(num + 1)]
    return [ShardPlan(split, k, num, stream, cuts[k], cuts[k + 1]) for k in range(num)]


def cut_shard(
    plan: ShardPlan, stream: Tokens, folder: Path, tokenizer: Tokenizer, tokenizer_sha256: str
) -> tuple[FileRecord, int]:
    """Write one shard into `folder`. Return (record, learned). record: the record of the shard for index.json. learned: the
    number of tokens of the shard that are in the loss, or 0 without a loss mask. Raises UsageError if the shard cannot be
    written. Independent."""
    text_bytes = learned = 0
    starts, tokens, of = stream.document_starts(plan.start, plan.stop), plan.stop - plan.start, bytes_of_tokens(tokenizer)

    def pieces() -> Iterator[np.ndarray]:
        nonlocal text_bytes
        at = 0
        for piece in stream.pieces(plan.start, plan.stop):
            is_start = np.zeros(len(piece), dtype=np.bool_)
            is_start[starts[(starts >= at) & (starts < at + len(piece))].astype(np.int64) - at] = True
            text_bytes += len(tokenizer.decode(piece).encode()) if of is None else int(of.count(piece, is_start).sum())
            at += len(piece)
            yield piece

    def masks() -> Iterator[np.ndarray]:
        nonlocal learned
        for piece in stream.masks(plan.start, plan.stop):
            learned += int(np.count_nonzero(piece))
            yield piece

    attributes: dict[str, int | str] = {
        "split": plan.split, "shard": plan.shard, "num_shards": plan.num_shards, "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod, "tokenizer_sha256": tokenizer_sha256,
    }
    with writing(folder / plan.name, ADVICE):
        info = write_shard(folder / plan.name, pieces(), tokens, starts, attributes, masks() if stream.masked else None)
    return FileRecord(plan.name, plan.split, tokens, len(starts), text_bytes, info.size, info.crc32, info.sha256), learned

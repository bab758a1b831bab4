"""Reads and writes Megatron-LM's indexed dataset: PREFIX.bin (the concatenated ids of all sequences) and PREFIX.idx (the index).

PREFIX.idx is little-endian, and has these fields:

  bytes b"MMIDIDX\\0\\0", the version 1 (uint64), the type of the ids (uint8)
  the number of sequences S (uint64), the number of document bounds (uint64)
  the length of each sequence in tokens (S x int32), its offset in PREFIX.bin in bytes (S x int64)
  the document bounds (int64): document d consists of the sequences [bounds[d], bounds[d + 1])

Multimodal datasets add one byte per sequence, its mode. Text has mode 0. (Source: Megatron-Core, datasets/indexed_dataset.py.)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.blocks import ReadOptions, SourcePart, TokenBlock
from data_tools.formats.rows import gather
from data_tools.formats.splits import files_in, in_splits
from data_tools.formats.stream import SplitTokens
from mpidp.errors import DataError, UsageError
from mpidp.runtime.files import create_file, open_regular, writing
from mpidp.runtime.log import counted
from mpidp.runtime.work_folder import work_folder

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")  # version, type, sequences, document bounds
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
ADVICE = "free space on its disk, or choose another prefix"


def dtype_code(vocab_size: int) -> int:
    """Return Megatron-LM's code for the type of the ids: 8 (uint16) if there are fewer than 65,500 ids, else 4 (int32).
    Pure."""
    return 8 if vocab_size < 65500 else 4


class MegatronWriter:
    """Writes PREFIX.bin and PREFIX.idx, with one sequence per document. Raises UsageError if one of these files exists or cannot
    be written. Independent."""

    def __init__(self, prefix: Path, scratch: Path, vocab_size: int) -> None:
        """`scratch`: a folder for temporary files, on the same file system."""
        self._files = [Path(f"{prefix}{end}") for end in (".bin", ".idx")]
        if there := [str(path) for path in self._files if path.exists()]:
            raise UsageError(f"{there[0]} exists and is not overwritten: choose another prefix, or remove it yourself")
        self._code = dtype_code(vocab_size)
        self._parts = [scratch / path.name for path in self._files]
        with writing(self._files[0], ADVICE):
            self._tokens = create_file(self._parts[0])  # close() closes the file

    def add(self, ids: np.ndarray) -> None:
        """Append ids. One call may append a part of a document or several documents. close() receives the document starts."""
        with writing(self._files[0], ADVICE):
            self._tokens.write(ids.astype(DTYPES[self._code]).tobytes())

    def close(self, starts: np.ndarray, tokens: int) -> None:
        """Write the index and move both files to their final names. `starts`: (d,) the start of each document. `tokens`: the
        total number of tokens."""
        lengths = np.diff(np.append(starts, tokens).astype(np.int64))
        if lengths.max(initial=0) >= 2**31:
            raise UsageError(f"a document has {lengths.max()} tokens, but the format stores only lengths below 2^31")
        size = np.dtype(DTYPES[self._code]).itemsize
        with writing(self._files[1], ADVICE), create_file(self._parts[1]) as index:
            index.write(MAGIC + HEADER.pack(1, self._code, len(lengths), len(lengths) + 1))
            index.write(lengths.astype("<i4").tobytes())
            index.write((starts.astype("<i8") * size).tobytes())
            index.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            index.flush()
            os.fsync(index.fileno())
        with writing(self._files[0], ADVICE):
            self._tokens.flush()
            os.fsync(self._tokens.fileno())
            self._tokens.close()
            for part, path in zip(self._parts, self._files, strict=True):
                os.replace(part, path)

    def abandon(self) -> None:
        """Close the temporary file."""
        with suppress(OSError):  # if the disk is full, writing the rest of the buffer fails
            self._tokens.close()


class MegatronReader:
    """Reads the documents of PREFIX.bin and PREFIX.idx. Raises DataError if the two files are inconsistent. Independent."""

    def __init__(self, prefix: Path) -> None:
        self.path, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        try:
            with open_regular(index) as file:
                data = file.read()
            with open_regular(self.path) as file:
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}). Give PREFIX if the files are PREFIX.bin and "
                            "PREFIX.idx") from None

        def wrong(problem: str) -> DataError:
            return DataError(f"{index}: {problem}. Copy PREFIX.bin and PREFIX.idx again, both from the same dataset")

        begin = len(MAGIC) + HEADER.size
        if data[: len(MAGIC)] != MAGIC or len(data) < begin:
            raise wrong("it is not a Megatron-LM index (it does not begin with MMIDIDX)")
        version, code, sequences, bounds = HEADER.unpack_from(data, len(MAGIC))
        if version != 1 or code not in DTYPES:
            raise wrong(f"it has version {version} and ids of type {code}, but mpidp reads only version 1 and types "
                        f"{', '.join(map(str, DTYPES))}")
        ends = np.cumsum([begin, 4 * sequences, 8 * sequences, 8 * bounds])
        # multimodal datasets have one more byte per sequence
        if len(data) not in (ends[-1], ends[-1] + sequences) or bounds < 1:
            raise wrong(f"it has {len(data)} bytes, but {sequences} sequences and {bounds} document bounds need {ends[-1]} bytes")
        self._dtype: np.dtype[Any] = np.dtype(DTYPES[code])
        self._lengths = np.frombuffer(data, "<i4", sequences, ends[0]).astype(np.int64)
        self._offsets = np.frombuffer(data, "<i8", sequences, ends[1])
        self._bounds = np.frombuffer(data, "<i8", bounds, ends[2])
        self.not_text = int(np.count_nonzero(np.frombuffer(data, "<i1", offset=ends[3])))  # number of sequences with other modes
        last = self._offsets + self._lengths * self._dtype.itemsize
        if sequences and (self._lengths.min() < 0 or self._offsets.min() < 0 or last.max() > size):
            raise wrong(f"some sequences lie outside the {size} bytes of {self.path}")
        if self._bounds[0] < 0 or (np.diff(self._bounds) < 0).any():
            raise wrong("the document bounds must not be negative or decrease")
        if self._bounds[-1] != sequences:
            raise wrong(f"the last document must end at {sequences}, the number of sequences, but it ends at {self._bounds[-1]}")
        self._bytes = np.memmap(self.path, dtype="u1", mode="r") if size else np.empty(0, dtype="u1")

    def documents(self) -> Iterator[np.ndarray]:
        """Yield the ids of each document. Sequences before the first document bound form one more document."""
        edges = [0, *self._bounds.tolist()]
        for low, high in zip(edges, edges[1:], strict=False):
            if low < high or low != 0:
                yield np.concatenate([self._sequence(i) for i in range(low, high)] or [np.empty(0, self._dtype)])

    def _sequence(self, i: int) -> np.ndarray:
        start = int(self._offsets[i])
        return self._bytes[start : start + int(self._lengths[i]) * self._dtype.itemsize].view(self._dtype)


def find(source: Path, remarks: list[str]) -> list[SourcePart]:
    """Return the prefixes of a source. `source`: a prefix, a folder that contains .idx files, or PREFIX if the prefixes of the
    files are PREFIX_train and perhaps PREFIX_val. Add remarks for the user to `remarks`. Raises DataError if a folder contains
    no .idx file. Independent."""
    if source.is_dir():
        return in_splits([path.with_suffix("") for path in files_in(source, "*.idx")], source, remarks)
    if source.suffix in (".bin", ".idx") and source.exists():
        source = source.with_suffix("")
    if Path(f"{source}.idx").exists():
        return [SourcePart(source)]
    val = [SourcePart(Path(f"{source}_val"), "val")] if Path(f"{source}_val.idx").exists() else []
    return [SourcePart(Path(f"{source}_train")), *val]


def read(prefix: Path, options: ReadOptions) -> Iterator[TokenBlock]:
    """Yield the documents of PREFIX as blocks. Raises DataError if PREFIX.bin and PREFIX.idx are inconsistent. Independent."""
    reader = MegatronReader(prefix)
    if other := reader.not_text:
        options.remark(f"{prefix}: {counted(other, 'sequence')} with a mode other than 0 (multimodal data) "
                       f"{'was' if other == 1 else 'were'} "
                       "read as text")
    yield from gather(({"input_ids": ids} for ids in reader.documents()), reader.path, options)


def write(tokens: SplitTokens, prefix: Path) -> list[str]:
    """Write PREFIX_SPLIT.bin and PREFIX_SPLIT.idx, with one sequence per document. Return remarks for the user. Raises UsageError
    if one of these files exists or cannot be written, or if another process is writing it. Independent."""
    path, starts, written = Path(f"{prefix}_{tokens.split}"), [], 0
    with work_folder(path) as scratch:
        writer = MegatronWriter(path, scratch, tokens.vocab_size)
        try:
            for block in tokens.blocks():
                assert block.starts is not None
                writer.add(block.ids)
                starts.append(block.starts + written)
                written += len(block.ids)
            writer.close(np.concatenate(starts), written)
        finally:
            writer.abandon()
    return []

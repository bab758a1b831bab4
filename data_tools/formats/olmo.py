"""Reads and writes the .npy files of OLMo, OLMo-core and dolma: ids as uint16 or uint32, without numpy's header.

NAME.csv.gz has one line "start,end,..." per document. Without this file, documents are found by their end-of-document token.
If there is a loss mask, it is in the file labels_mask_part_N.npy (bool) beside token_ids_part_N.npy. The mask is true for
tokens in the loss. Files with a header, which numpy.save wrote, are read too. (Source: OLMo-core, data/utils.py;
open-instruct, convert_sft_data_for_olmocore.py.)
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.blocks import ReadOptions, SourcePart, TokenBlock, read_array, readable, with_starts
from data_tools.formats.flat import NUMPY, check_head, head_of, type_of_ids
from data_tools.formats.splits import files_in, in_splits
from data_tools.formats.stream import SplitTokens, whole_documents
from mpidp.errors import DataError
from mpidp.runtime.files import open_regular

IDS, MASKS = "token_ids_part_", "labels_mask_part_"
FILE_TOKENS = 2**28  # approximate number of tokens of a file


def find(source: Path, remarks: list[str]) -> list[SourcePart]:
    """Return the .npy files of a source that hold ids. Add remarks for the user to `remarks`. Raises DataError if there are no
    such files. Independent."""
    found = [path for path in files_in(source, "*.npy") if not path.name.startswith(MASKS) or path == source]
    return in_splits(found, source, remarks)


def read(path: Path, options: ReadOptions) -> Iterator[TokenBlock]:
    """Yield the tokens of a .npy file as blocks. Raises DataError if the file is damaged or has another format. Independent."""
    head = head_of(path)
    if head.startswith(NUMPY):
        kind, offset, tokens = _numpy_header(path)
    else:
        check_head(path, head)
        kind, offset, tokens = type_of_ids(path, head, options), 0, -1
    pieces, masks = read_array(path, kind, offset, tokens), _masks(path)
    if masks is not None:
        pairs: Iterator[tuple[np.ndarray, np.ndarray | None]] = _in_step(pieces, masks, path)
    else:
        pairs = zip(pieces, repeat(None))
    starts = _starts(path, (path.stat().st_size - offset) // kind.itemsize)
    yield from (TokenBlock(ids, None, mask) for ids, mask in pairs) if starts is None else with_starts(pairs, starts)


def _numpy_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    with readable(path), open_regular(path) as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, kind = read_header(file)
        except ValueError as error:
            raise DataError(f"{path}: its header is not valid ({error}); write the file again") from None
        if kind.hasobject:
            raise DataError(f"{path} holds pickled objects, and pickles are never read: save an array of integers")
        if kind.kind not in "iu" or len(shape) != 1:
            raise DataError(f"{path} holds an array of {kind} with shape {shape}, but ids must be integers in one dimension")
        return kind, file.tell(), int(shape[0])


def _masks(path: Path) -> Iterator[np.ndarray] | None:
    beside = path.with_name(path.name.replace(IDS, MASKS, 1))
    if beside == path or not beside.exists():
        return None
    return read_array(beside, "u1", unit="mask")


def _in_step(
    pieces: Iterator[np.ndarray], masks: Iterator[np.ndarray], path: Path
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    for ids in pieces:
        mask = next(masks, np.empty(0, np.uint8))
        if len(mask) != len(ids):
            raise DataError(f"{path}: its mask, the file {MASKS}..., has fewer entries than there are tokens. Copy both files "
                            "again")
        yield ids, (mask != 0).astype(np.uint8)
    if next(masks, None) is not None:
        raise DataError(f"{path}: its mask, the file {MASKS}..., has more entries than there are tokens. Copy both files again")


def _starts(path: Path, tokens: int) -> np.ndarray | None:
    """Return the document starts that NAME.csv.gz lists, or None if there is no such file. `tokens`: the number of tokens of
    NAME.npy. Raises DataError if the table cannot be read or does not describe these tokens."""
    table = path.with_suffix(".csv.gz")
    if not table.exists():
        return None
    found, end = [], 0
    with readable(table):
        try:
            with open_regular(table) as packed, io.TextIOWrapper(gzip.GzipFile(fileobj=packed), "utf-8", "replace") as file:
                for line, row in enumerate(csv.reader(file), 1):
                    start, stop = int(row[0]), int(row[1])
                    if start != end or not start <= stop <= tokens:
                        raise DataError(f"{table}, line {line}: the document {start},{stop} must begin at {end}, where the "
                                        f"previous document ends, and must not end after {tokens}, the number of tokens. Use the "
                                        f"table of {path.name}, or remove the table")
                    found += [start] * (start < stop)
                    end = stop
        except (ValueError, IndexError, EOFError, zlib.error, csv.Error):
            raise DataError(f"{table}: cannot be read as lines of the form START,END. Restore the table, or remove it") from None
    if end < tokens:
        found.append(end)
    return np.array(found, dtype=np.int64)


def write(tokens: SplitTokens, out: Path) -> list[str]:
    """Write OUT/SPLIT/token_ids_part_N.npy and .csv.gz. If there is a loss mask, also write OUT/SPLIT/labels_mask_part_N.npy.
    Each file contains whole documents. Return remarks for the user. Raises OSError if a file cannot be written. Independent."""
    folder, number, written = out / tokens.split, -1, FILE_TOKENS
    folder.mkdir()
    for block in whole_documents(tokens.blocks()):
        assert block.starts is not None
        if written >= FILE_TOKENS:
            number, written = number + 1, 0
        name = f"{number:04d}"
        _append(folder / f"{IDS}{name}.npy", block.ids.astype(tokens.dtype).tobytes())
        if block.mask is not None:
            _append(folder / f"{MASKS}{name}.npy", block.mask.tobytes())
        ends = [*block.starts[1:].tolist(), len(block.ids)]
        lines = "".join(f"{written + a},{written + b}\n" for a, b in zip(block.starts.tolist(), ends, strict=True))
        _append(folder / f"{IDS}{name}.csv.gz", gzip.compress(lines.encode(), mtime=0))
        written += len(block.ids)
    return []


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)

"""Reads and writes MDS, the format of MosaicML Streaming: a folder with index.json and shards. The token ids of a sample are
in one column, of type bytes or ndarray.

A shard has the number of samples (uint32), the offsets of all samples and of the end (uint32), a configuration, and then the
samples. A sample has the sizes (uint32) of those columns that have no fixed size, and then all columns. An ndarray may begin
with its type and its shape. A column that contains pickles is never read. (Source: mosaicml-streaming, base/format/mds.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.blocks import ReadOptions, SourcePart, TokenBlock
from data_tools.formats.columns import DIVIDERS, wanted_columns
from data_tools.formats.expand import expanded
from data_tools.formats.row_files import FILE_BYTES, RowFiles, documents, mapped, offsets_of
from data_tools.formats.rows import file_below, gather, has_index, read_json
from data_tools.formats.splits import folders_with_index
from data_tools.formats.stream import SplitTokens
from mpidp.errors import DataError

SHAPES = ("<u1", "<u2", "<u4", "<u8")
TYPES = {8: "<u1", 9: "<i1", 16: "<u2", 17: "<i2", 18: "<f2", 32: "<u4", 33: "<i4", 34: "<f4", 64: "<u8", 65: "<i8", 66: "<f8"}
NAMES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")  # types of ndarray columns


def find(source: Path, remarks: list[str]) -> list[SourcePart]:
    """Return the folders with MDS shards. Add remarks for the user to `remarks`. Raises DataError if there are no such folders.
    Independent."""
    return folders_with_index(source, is_one, "MosaicML Streaming", "MDSWriter", remarks)


def is_one(folder: Path) -> bool:
    """Return whether a folder has the index.json of MDS shards. Raises DataError if index.json is not JSON. Independent."""
    return has_index(folder, shards=list)


def read(path: Path, options: ReadOptions) -> Iterator[TokenBlock]:
    """Yield the samples of a folder as blocks. Raises DataError if the folder is damaged, or if no column holds ids.
    Independent."""
    yield from gather(_rows(path, options), path, options)


def _rows(folder: Path, options: ReadOptions) -> Iterator[dict[str, np.ndarray]]:
    index = folder / "index.json"
    for number, shard in enumerate(read_json(index)["shards"]):
        try:
            if (shard["format"], shard["version"]) != ("mds", 2):
                raise DataError(f"{index}: shard {number} has the format {shard['format']}, version {shard['version']}, "
                                "but mpidp reads only the format 'mds', version 2")
            names, encodings, sizes = shard["column_names"], shard["column_encodings"], shard["column_sizes"]
            raw, packed, samples = shard["raw_data"], shard["zip_data"], int(shard["samples"])
            with ExitStack() as stack:
                path = file_below(folder, raw["basename"], index)
                if not path.exists() and packed:
                    path = stack.enter_context(expanded(file_below(folder, packed["basename"], index), str(shard["compression"]),
                                                        int(raw["bytes"]), options.scratch))
                yield from _samples(path, folder / raw["basename"], samples, names, encodings, sizes, options)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{index}: the entry of shard {number} is not a valid MDS entry ({error!r}). Restore this "
                            "file") from None


def _samples(
    path: Path, shown: Path, samples: int, names: list[str], encodings: list[str], sizes: list[int | None], options: ReadOptions
) -> Iterator[dict[str, np.ndarray]]:
    arrays = [name for name, one in zip(names, encodings, strict=True)
              if one.startswith("ndarray") or name in DIVIDERS and one in ("bytes", "pkl")]
    wanted = wanted_columns(names, options, shown, arrays)
    for name in wanted:
        _check_encoding(name, encodings[names.index(name)], shown)
    data = mapped(path)
    offsets = offsets_of(data, samples, shown)
    for number in range(samples):
        sample, at = data[offsets[number] : offsets[number + 1]], 4 * sum(size is None for size in sizes)
        given = iter(sample[:at].view("<u4").tolist()) if len(sample) >= at else iter(())
        found: dict[str, np.ndarray] = {}
        for name, encoding, size in zip(names, encodings, sizes, strict=True):
            size = next(given, None) if size is None else size
            if size is None or at + size > len(sample):
                raise DataError(f"{shown}: sample {number} is shorter than its columns; copy the dataset again")
            if name in wanted:
                found[name] = _decoded(np.array(sample[at : at + size]), encoding, name, shown, options)
            at += size
        yield {name: found[name] for name in wanted}


def _check_encoding(name: str, encoding: str, shown: Path) -> None:
    kind = encoding.partition(":")[0]
    if kind == "pkl":
        raise DataError(f"{shown}: the column `{name}` holds pickles, which are never read. Write it as ndarray or bytes")
    if kind not in ("bytes", "ndarray"):
        raise DataError(f"{shown}: the column `{name}` has the encoding {encoding}, but ids must be ndarray or bytes. If "
                        "this column holds text, write the samples as JSON lines and use mpidp prepare")


def _decoded(data: np.ndarray, encoding: str, name: str, shown: Path, options: ReadOptions) -> np.ndarray:
    if encoding == "bytes":
        return _of_bytes(data, name, shown, options)
    given, _, fixed = encoding.removeprefix("ndarray").removeprefix(":").partition(":")
    try:
        at = 0 if given else 1
        kind = np.dtype(given).newbyteorder("<") if given else np.dtype(TYPES[int(data[0])])
        if fixed:
            shape = [int(size) for size in fixed.split(",")]
        else:
            width = np.dtype(SHAPES[int(data[at]) % 4])
            dims = int(data[at]) >> 2
            shape = data[at + 1 : at + 1 + dims * width.itemsize].view(width).astype(np.int64).tolist()
            at += 1 + dims * width.itemsize
        values = np.frombuffer(data[at:].tobytes(), kind)
    except (TypeError, ValueError, KeyError, IndexError):
        raise DataError(f"{shown}: the column `{name}` does not hold arrays of the encoding {encoding}; copy the dataset "
                        "again") from None
    if len(values) != math.prod(shape):
        raise DataError(f"{shown}: an array of the column `{name}` has {len(values)} values, but the shape {shape}; copy the "
                        "dataset again")
    return values if len(shape) == 1 else values.reshape(shape)


def _of_bytes(data: np.ndarray, name: str, shown: Path, options: ReadOptions) -> np.ndarray:
    """Return the ids in a column of bytes. Their type is --dtype if given, else int64, which LLM Foundry writes. Raises DataError
    if the bytes are not ids of this type. `name`, `shown`: the column and the path in the error message."""
    kind: np.dtype[Any] = np.dtype(options.dtype or "int64").newbyteorder("<")
    values = np.frombuffer(data.tobytes(), kind) if len(data) % kind.itemsize == 0 else None
    if values is None or not options.dtype and len(values) and not (values.min() >= -100 and values.max() < 2**32):
        raise DataError(f"{shown}: the column `{name}` holds bytes that are not {kind.name} ids. Give the type of the "
                        "ids, for example --dtype uint16")
    return values


def write(tokens: SplitTokens, out: Path) -> list[str]:
    """Write the folder OUT/SPLIT, with one sample per document. The column `tokens` contains the ids. If there is a loss mask,
    the column `labels` contains the labels (see columns.py). Return remarks for the user. Raises OSError if a file cannot be
    written. Independent."""
    folder = out / tokens.split
    folder.mkdir()
    columns = {"labels": "ndarray:int64"} if tokens.has_loss_mask else {}
    columns["tokens"] = f"ndarray:{tokens.dtype.name}"  # MDS sorts columns by name
    about = {"column_encodings": [*columns.values()], "column_names": [*columns], "column_sizes": [None] * len(columns),
             "compression": None, "format": "mds", "hashes": [], "size_limit": FILE_BYTES, "version": 2}
    files = RowFiles(lambda number: folder / f"shard.{number:05}.mds", json.dumps(about).encode())
    for ids, labels in documents(tokens.blocks()):
        found = [_encoded(ids)] if labels is None else [_encoded(labels), _encoded(ids)]
        files.add(np.array([len(one) for one in found], "<u4").tobytes() + b"".join(found), len(ids))
    files.close()
    shards = [about | {"samples": rows, "zip_data": None, "raw_data": {"basename": path.name, "bytes": size, "hashes": {}}}
              for path, size, rows, _ in files.written]
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}, sort_keys=True))
    return []


def _encoded(values: np.ndarray) -> bytes:
    """Return the MDS encoding of an array of one dimension: a byte, the array's length, and the values. The lowest 2 bits of
    the byte encode the type of the length. The other bits are the number of dimensions, 1."""
    width = sum(len(values) >= 2**bits for bits in (8, 16, 32))
    return bytes([1 << 2 | width]) + np.array([len(values)], SHAPES[width]).tobytes() + values.tobytes()

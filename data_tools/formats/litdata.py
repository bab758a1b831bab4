"""Reads and writes datasets of LitData: a folder with index.json and chunks. A sample is a tensor of ids, which LitData reads
with TokensLoader, or a dict whose columns are tensors.

A chunk has the number of samples (uint32), the offsets of all samples and of the end (uint32), and then the samples. A sample
for TokensLoader has only the ids. Other samples have the sizes of their columns (uint32), and then the columns. Samples that
are dicts of lists may be stored as an Arrow file at the end of a chunk. index.json names the type of each column. A column
that contains pickles is never read. (Source: litdata, streaming/writer.py, serializers.py and framed_zstd.py.)
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.arrow import batch_blocks, read_ipc
from data_tools.formats.blocks import ReadOptions, SourcePart, TokenBlock, readable
from data_tools.formats.columns import DIVIDERS, wanted_columns
from data_tools.formats.expand import expanded
from data_tools.formats.row_files import FILE_BYTES, RowFiles, documents, mapped, offsets_of
from data_tools.formats.rows import file_below, gather, has_index, read_json
from data_tools.formats.splits import folders_with_index
from data_tools.formats.stream import SplitTokens
from mpidp.data.unpack import zstandard
from mpidp.errors import DataError
from mpidp.runtime.files import open_regular

TENSORS = {0: "<f4", 1: "<f4", 2: "<f8", 3: "<f8", 8: "<f2", 9: "<f2", 11: "u1", 12: "i1", 13: "<i2", 14: "<i2", 15: "<i4",
           16: "<i4", 17: "<i8", 18: "<i8", 19: "u1", 20: "<u2"}  # types of tensors by LitData's number of the type
ARRAYS = dict(enumerate(("i1", "<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8")))  # types of arrays
ARRAYS_OF = ("no_header_tensor", "no_header_numpy", "tensor", "numpy")  # kinds of columns with arrays
ARROW_END, FRAMED = b"LDARW01\0", b"LDFZ01\0\0"
MAX_ITEM_BYTES = 2**30  # largest size of a compressed sample


def find(source: Path, remarks: list[str]) -> list[SourcePart]:
    """Return the folders with LitData chunks. Add remarks for the user to `remarks`. Raises DataError if there are no such
    folders. Independent."""
    return folders_with_index(source, is_one, "LitData", "litdata.optimize", remarks)


def is_one(folder: Path) -> bool:
    """Return whether a folder has the index.json of LitData chunks. Raises DataError if index.json is not JSON. Independent."""
    return has_index(folder, chunks=list, config=dict)


def read(path: Path, options: ReadOptions) -> Iterator[TokenBlock]:
    """Yield the samples of a folder as blocks. Raises DataError if the folder is damaged, or if no column holds ids.
    Independent."""
    index = path / "index.json"
    about = read_json(index)
    config = about["config"]
    try:
        if config.get("encryption"):
            raise DataError(f"{index}: mpidp cannot read encrypted chunks. Write the dataset again without encryption")
        names, formats = _columns(config, index), [str(one) for one in config["data_format"]]
        codec, level = str(config.get("compression") or ""), str(config.get("compression_level") or "chunk")
        for chunk in about["chunks"]:
            file = file_below(path, chunk["filename"], index)
            with ExitStack() as stack:
                if codec and level == "chunk" and not _ends_with_arrow(file):
                    file = stack.enter_context(expanded(file, codec, int(chunk["chunk_bytes"]), options.scratch))
                if _ends_with_arrow(file):
                    yield from _arrow(file, path / chunk["filename"], options)
                    continue
                raw = config.get("item_loader") == "TokensLoader" or chunk.get("dim") is not None  # older versions name no loader
                rows = _samples(file, path / chunk["filename"], int(chunk["chunk_size"]), names, formats, raw,
                                level if codec else "", options)
                yield from gather(rows, path / chunk["filename"], options)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{index}: the content is not what LitData writes ({error!r}). Restore the file") from None


def _columns(config: dict[str, Any], index: Path) -> list[str]:
    """Return the names of the columns of a sample. If a sample is a dict, these are its keys. If a sample is a single tensor,
    or a list with one tensor, the name is input_ids. Raises DataError for other samples. `index`: the file that the error
    names."""
    _, spec = json.loads(config["data_spec"])
    if not spec.get("children_spec"):
        return ["input_ids"]
    kind, keys = str(spec["type"]), spec.get("context")
    keys = json.loads(keys) if isinstance(keys, str) else keys
    flat = all(not child.get("children_spec") for child in spec["children_spec"])
    if flat and "dict" in kind.lower() and isinstance(keys, list):
        return [str(key) for key in keys]
    if kind in ("builtins.list", "builtins.tuple") and len(spec["children_spec"]) == 1:
        return ["input_ids"]
    raise DataError(f"{index}: a sample is a {kind}, but mpidp reads only tensors, and dicts whose values are tensors")


def _ends_with_arrow(path: Path) -> bool:
    with readable(path), open_regular(path) as file:
        file.seek(max(0, path.stat().st_size - 8))
        return file.read(8) == ARROW_END


def _arrow(path: Path, shown: Path, options: ReadOptions) -> Iterator[TokenBlock]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(size - 12)
        length = struct.unpack("<I", file.read(4))[0]
    if not 0 < length <= size - 12:
        raise DataError(f"{shown}: the length of its Arrow data is not valid; copy the dataset again")
    yield from batch_blocks(read_ipc(path, shown, size - 12 - length, length), shown, options)


def _samples(
    path: Path, shown: Path, samples: int, names: list[str], formats: list[str], raw: bool, level: str, options: ReadOptions
) -> Iterator[dict[str, np.ndarray]]:
    kinds = dict(zip(names, formats, strict=True))
    families = {name: kind.partition(":")[0] for name, kind in kinds.items()}
    arrays = [name for name in names if families[name] in ARRAYS_OF or name in DIVIDERS and families[name] == "pickle"]
    wanted = wanted_columns(names, options, shown, arrays)
    for name in wanted:
        _check_format(name, kinds[name], shown)
    for number, data in enumerate(_items(path, shown, samples, level)):
        found, at = {}, 0 if raw else 4 * len(names)
        sizes = [len(data)] if raw else np.frombuffer(data[:at], "<u4").tolist()
        if len(sizes) != len(names) or at + sum(sizes) > len(data):
            raise DataError(f"{shown}: sample {number} is shorter than its columns; copy the dataset again")
        for name, size in zip(names, sizes, strict=True):
            if name in wanted:
                found[name] = _decoded(data[at : at + size], kinds[name], shown)
            at += size
        yield {name: found[name] for name in wanted}


def _items(path: Path, shown: Path, samples: int, level: str) -> Iterator[bytes]:
    """Yield the bytes of each sample of a chunk."""
    data = mapped(path)
    if bytes(data[:8]) == FRAMED:
        yield from _framed(data, offsets_of(data, samples, shown, count_at=12, table_at=24), shown)
        return
    offsets = offsets_of(data, samples, shown)
    for low, high in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        item = data[low:high].tobytes()
        yield _inflated(item, None, shown) if level == "sample" else item


def _framed(data: np.ndarray, offsets: np.ndarray, shown: Path) -> Iterator[bytes]:
    frames, table = int(data[20:24].view("<u4")[0]), 24 + 4 * len(offsets)
    kind = np.dtype([("first", "<u4"), ("items", "<u4"), ("at", "<u8"), ("length", "<u4"), ("size", "<u4")])
    found = np.frombuffer(data[table : table + frames * kind.itemsize].tobytes(), kind)
    expected = 0
    for first, items, at, length, size in found.tolist():
        ends = offsets[first : first + items + 1] - offsets[min(first, len(offsets) - 1)]
        if first != expected or len(ends) != items + 1 or at + length > len(data) or ends[-1] != size:
            raise DataError(f"{shown}: its table of compressed parts is not valid; copy the dataset again")
        expected += items
        inflated = _inflated(data[at : at + length].tobytes(), size, shown)
        yield from (inflated[low:high] for low, high in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
    if expected != len(offsets) - 1:
        raise DataError(f"{shown}: its table of compressed parts does not contain all samples; copy the dataset again")


def _inflated(data: bytes, size: int | None, shown: Path) -> bytes:
    """Return the decompressed bytes of a sample or a frame. `size`: the number of these bytes, or None if the file does not
    state it."""
    library = zstandard(shown)
    try:
        if size is None and 0 <= (stated := library.frame_content_size(data)) <= MAX_ITEM_BYTES:  # -1: not stated
            size = stated
        with library.ZstdDecompressor().stream_reader(data) as stream:
            found: bytes = stream.read((MAX_ITEM_BYTES if size is None else size) + 1)
    except library.ZstdError as error:
        raise DataError(f"{shown}: damaged zstd data ({error}); copy the dataset again") from None
    if size is None and len(found) > MAX_ITEM_BYTES:
        raise DataError(f"{shown}: a sample has more than {MAX_ITEM_BYTES:,} bytes. Write the dataset again with shorter samples")
    if size is not None and len(found) != size:
        raise DataError(f"{shown}: a compressed part does not decompress to the stated {size} bytes; copy the dataset again")
    return found


def _check_format(name: str, kind: str, shown: Path) -> None:
    family = kind.partition(":")[0]
    if family == "pickle":
        raise DataError(f"{shown}: the column `{name}` holds pickles, which are never read. Write it as a tensor of integers")
    if family not in ARRAYS_OF:
        raise DataError(f"{shown}: the column `{name}` holds {kind}, but ids must be tensors or arrays. If this column "
                        "holds text, write the samples as JSON lines and use mpidp prepare")


def _decoded(data: bytes, kind: str, shown: Path) -> np.ndarray:
    family, _, code = kind.partition(":")
    types = ARRAYS if "numpy" in family else TENSORS
    try:
        if code:
            return np.frombuffer(data, types[int(code)])
        order = "<" if family == "numpy" else ">"
        number, dims = struct.unpack_from(f"{order}II", data)
        shape = struct.unpack_from(f"{order}{dims}I", data, 8)
        return np.frombuffer(data, types[number], offset=8 + 4 * dims).reshape(shape)
    except (KeyError, ValueError, struct.error):
        raise DataError(f"{shown}: a column of the kind {kind} cannot be read as an array of integers. Write the dataset again "
                        "with tensors of int32 or int64") from None


def write(tokens: SplitTokens, out: Path) -> list[str]:
    """Write the folder OUT/SPLIT, with one sample per document. Without a loss mask, a sample is a tensor for TokensLoader.
    With a loss mask, a sample is a dict of `input_ids` and `labels`. The ids are uint16 or, for larger vocabularies, int32
    (not uint32, for which torch has few functions). Return remarks for the user. Raises OSError if a file cannot be written.
    Independent."""
    folder, masked = out / tokens.split, tokens.has_loss_mask
    folder.mkdir()
    code = 20 if tokens.dtype.itemsize == 2 else 16
    files = RowFiles(lambda number: folder / f"chunk-0-{number}.bin")
    for ids, labels in documents(tokens.blocks()):
        data = [ids.astype(TENSORS[code]).tobytes()] + ([] if labels is None else [labels.astype("<i8").tobytes()])
        head = np.array([len(one) for one in data], "<u4").tobytes() if masked else b""
        files.add(head + b"".join(data), len(ids))
    files.close()
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    spec = {"type": "builtins.dict", "context": json.dumps(["input_ids", "labels"]), "children_spec": [leaf, leaf]}
    config = {
        "chunk_bytes": FILE_BYTES, "chunk_size": None, "compression": None, "compression_batch_size": None,
        "compression_level": None, "data_format": [f"no_header_tensor:{code}"] + ["no_header_tensor:18"] * masked,
        "data_spec": json.dumps([1, spec if masked else leaf]), "encryption": None, "ipc_compression": None,
        "item_loader": "PyTreeLoader" if masked else "TokensLoader",
        "types": {"input_ids": "tensor", "labels": "tensor"} if masked else "tensor"}
    chunks = [{"chunk_bytes": size, "chunk_size": rows, "dim": None if masked else count, "filename": path.name}
              for path, size, rows, count in files.written]
    about = {"chunks": chunks, "config": config, "updated_at": files.digest.hexdigest()}  # part of litdata's cache path
    (folder / "index.json").write_text(json.dumps(about, sort_keys=True))
    return []

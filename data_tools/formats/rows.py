"""Rows of several columns, gathered into blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.blocks import BLOCK_TOKENS, ReadOptions, TokenBlock
from data_tools.formats.columns import block_of_rows
from mpidp.errors import DataError
from mpidp.runtime.files import open_regular
from mpidp.runtime.json_file import parse_json

MAX_JSON_BYTES = 256 * 2**20


def gather(rows: Iterable[Mapping[str, np.ndarray]], where: Path, options: ReadOptions) -> Iterator[TokenBlock]:
    """Yield blocks of whole rows. rows: columns by name, the ids first, each (n,). Rows without tokens are counted.

    Raises DataError if the columns of a row differ in length, or if the ids are not integers. Independent.
    """
    held: list[Mapping[str, np.ndarray]] = []
    tokens = first = 0
    for number, row in enumerate(rows):
        lengths = {name: values.shape for name, values in row.items()}
        if len(set(lengths.values())) > 1 or any(len(shape) != 1 for shape in lengths.values()):
            raise DataError(f"{where}: row {number} has columns of the shapes {lengths}, but all must have one value per token")
        if any(values.dtype.kind not in "iub" for values in row.values()):
            raise DataError(f"{where}: row {number} has columns of the types "
                            f"{ {name: str(v.dtype) for name, v in row.items()} }, but "
                            "ids, masks and labels are integers")
        held.append(row)
        tokens += next(iter(row.values())).size
        if tokens >= BLOCK_TOKENS:
            yield _block(held, where, first, options)
            held, tokens, first = [], 0, number + 1
    if held:
        yield _block(held, where, first, options)


def _block(held: list[Mapping[str, np.ndarray]], where: Path, first: int, options: ReadOptions) -> TokenBlock:
    columns = {name: np.concatenate([row[name] for row in held]) for name in held[0]}
    lengths = np.array([next(iter(row.values())).size for row in held], dtype=np.int64)
    return block_of_rows(columns, lengths, where, first, options)


def read_json(path: Path) -> Any:
    """Read a JSON file that describes a dataset. Raises DataError if it cannot be read. Independent."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise DataError(f"{path} has more than {MAX_JSON_BYTES:,} bytes")
        return parse_json(data)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore the file") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); restore the file") from None


def file_below(folder: Path, name: Any, index: Path) -> Path:
    """Return FOLDER/NAME. Raises DataError unless the name stays below the folder: an index is not trusted. Independent."""
    parts = name.replace("\\", "/").split("/") if isinstance(name, str) else []
    if not parts or any(part in ("", ".", "..") for part in parts):
        raise DataError(f"{index} names the file {name!r}, which is not a plain path below its folder")
    return folder / name


def has_index(folder: Path, **kinds: type) -> bool:
    """Return whether FOLDER/index.json has these keys, with values of these types. Raises DataError if it is not JSON.
    Independent."""
    about = read_json(folder / "index.json") if (folder / "index.json").is_file() else None
    return isinstance(about, dict) and all(isinstance(about.get(key), kind) for key, kind in kinds.items())

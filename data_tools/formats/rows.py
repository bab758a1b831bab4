"""Gathers rows of several columns into blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.blocks import BLOCK_TOKENS, ReadOptions, TokenBlock
from data_tools.formats.columns import PARTS, block_of_rows
from mpidp.errors import DataError
from mpidp.runtime.files import open_regular
from mpidp.runtime.json_file import parse_json

MAX_JSON_BYTES = 256 * 2**20


def gather(rows: Iterable[Mapping[str, np.ndarray]], where: Path, options: ReadOptions) -> Iterator[TokenBlock]:
    """Yield blocks of whole rows. Raises DataError as block_of_rows does, and if the columns of a row have wrong shapes.
    Independent.

    `rows`: the columns of each row by name, the ids first. All columns are arrays of one dimension. The columns with a value
    for each token have the same length. Rows without tokens are counted in `options`.
    """
    held: list[Mapping[str, np.ndarray]] = []
    tokens = first = 0
    for number, row in enumerate(rows):
        shapes = {name: values.shape for name, values in row.items()}
        of_tokens = {shape for name, shape in shapes.items() if name not in PARTS}
        if len(of_tokens) > 1 or any(len(shape) != 1 for shape in shapes.values()):
            raise DataError(f"{where}: row {number} has columns of the shapes {shapes}, but every column must have one value per "
                            "token")
        held.append(row)
        tokens += next(iter(row.values())).size
        if tokens >= BLOCK_TOKENS:
            yield _block(held, where, first, options)
            held, tokens, first = [], 0, number + 1
    if held:
        yield _block(held, where, first, options)


def _block(held: list[Mapping[str, np.ndarray]], where: Path, first: int, options: ReadOptions) -> TokenBlock:
    columns = {name: np.concatenate([row[name] for row in held]) for name in held[0]}
    counts = {name: np.array([row[name].size for row in held], dtype=np.int64) for name in held[0]}
    parts = {name: (columns.pop(name), counts[name]) for name in held[0] if name in PARTS}
    return block_of_rows(columns, counts[next(iter(columns))], where, first, options, parts)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file that describes a dataset. Raises DataError if the file cannot be read. Independent."""
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
    """Return FOLDER/NAME. `name`: NAME as read from the file `index`, which is not trusted. Raises DataError if NAME is not
    the path of a file below the folder. Independent."""
    parts = name.replace("\\", "/").split("/") if isinstance(name, str) else []
    if not parts or any(part in ("", ".", "..") for part in parts):
        raise DataError(f"{index} names the file {name!r}, which is not a plain path below its folder")
    return folder / name


def has_index(folder: Path, **kinds: type) -> bool:
    """Return whether FOLDER/index.json has all keys of `kinds`, each with a value of the given type. Raises DataError if the file
    is not JSON. Independent."""
    about = read_json(folder / "index.json") if (folder / "index.json").is_file() else None
    return isinstance(about, dict) and all(isinstance(about.get(key), kind) for key, kind in kinds.items())

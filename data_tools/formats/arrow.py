"""Reads record batches of Arrow and parquet files as blocks of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.blocks import ReadOptions, TokenBlock
from data_tools.formats.columns import PARTS, block_of_rows, wanted_columns
from mpidp.errors import DataError, UsageError

BATCH_ROWS = 256  # number of rows of a parquet file that are read at once
BUFFER_BYTES = 2**20  # read buffer of a column; without it, pyarrow reads whole row groups into memory


def pyarrow(path: Path) -> Any:
    """Return the package pyarrow, with the submodules that the readers need. Raises UsageError if pyarrow is not installed.
    `path`: the file to name in the error message. Independent."""
    try:
        import pyarrow as library
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UsageError(f"{path}: reading Arrow and parquet files needs pyarrow. Run pip install 'mpidp[data]'") from None
    return library


def read_ipc(path: Path, shown: Path, offset: int = 0, length: int | None = None) -> Iterator[Any]:
    """Yield the record batches of an Arrow file. The file may have Arrow's stream format, which save_to_disk writes, or
    Arrow's file format. `offset`, `length`: where the Arrow data begins in the file, and its length, in bytes (None: the whole
    file). `shown`: the path in error messages. Raises DataError if the file cannot be read. Independent."""
    library = pyarrow(shown)
    try:
        with library.memory_map(str(path)) as mapped:
            data = mapped.read_buffer() if length is None else mapped.read_buffer()[offset : offset + length]
            if data.slice(0, min(6, data.size)).to_pybytes() == b"ARROW1":
                file = library.ipc.open_file(data)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            else:
                batches = iter(library.ipc.open_stream(data))
            for batch in batches:
                batch.validate(full=True)  # offsets in a damaged file may point outside the file
                yield batch
    except (library.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shown} is not a readable Arrow file ({error}); copy it again") from None


def read_parquet(path: Path, options: ReadOptions) -> Iterator[Any]:
    """Yield the record batches of a parquet file, with only the needed columns. Raises DataError if the file cannot be read.
    Independent."""
    library = pyarrow(path)
    try:
        given = {"buffer_size": BUFFER_BYTES, "pre_buffer": False, "page_checksum_verification": True}
        with library.parquet.ParquetFile(path, **given) as file:
            wanted = _wanted(file.schema_arrow, options, path)
            yield from file.iter_batches(batch_size=BATCH_ROWS, columns=wanted)
    except (library.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable parquet file ({error}); copy it again") from None


def batch_blocks(batches: Iterable[Any], where: Path, options: ReadOptions) -> Iterator[TokenBlock]:
    """Yield the rows of record batches as blocks. `where`: the path in error messages. Raises DataError if a column of ids,
    masks, labels or document boundaries does not hold lists of integers. Independent."""
    first = 0
    for batch in batches:
        columns: dict[str, np.ndarray] = {}
        parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        lengths = np.empty(0, np.int64)
        for name in _wanted(batch.schema, options, where):
            values, sizes = _flat(batch.column(name), name, where, first)
            if name in PARTS:
                parts[name] = values, sizes
                continue
            if columns and not np.array_equal(sizes, lengths):
                row = int(np.argmax(sizes != lengths))
                raise DataError(f"{where}: row {first + row} has {int(lengths[row])} values in `{next(iter(columns))}` and "
                                f"{int(sizes[row])} in `{name}`, but every column must have one value per token")
            columns[name], lengths = values, sizes
        block = block_of_rows(columns, lengths, where, first, options, parts)
        first += batch.num_rows
        if len(block.ids):
            yield block


def _wanted(schema: Any, options: ReadOptions, where: Path) -> list[str]:
    types = pyarrow(where).types

    def holds_numbers(kind: Any) -> bool:
        while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            kind = kind.value_type
        return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind))

    arrays = [one.name for one in schema if types.is_nested(one.type) and holds_numbers(one.type)]
    return wanted_columns(schema.names, options, where, arrays)


def _flat(column: Any, name: str, where: Path, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (values, counts) of a list column. values: (n,) the values of all rows, one row after the other. counts: (r,) the
    number of values of each row."""
    library = pyarrow(where)
    types = library.types
    kind = column.type
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        raise DataError(f"{where}: the column `{name}` has the type {kind}, not a list of integers. Name another column "
                        "with --column. If this column holds text, use mpidp prepare")
    if not (types.is_integer(kind.value_type) or types.is_boolean(kind.value_type) or types.is_floating(kind.value_type)):
        raise DataError(f"{where}: the column `{name}` holds lists of {kind.value_type}, but ids, masks and labels are integers")
    values, sizes = column.flatten(), library.compute.list_value_length(column).fill_null(0)
    if values.null_count:
        raise DataError(f"{where}: row {first} or a later row has a null among the values of `{name}`. Write an integer for each "
                        "token")
    return values.to_numpy(zero_copy_only=False), sizes.to_numpy(zero_copy_only=False).astype(np.int64)

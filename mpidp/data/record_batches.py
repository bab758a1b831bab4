"""Reads .parquet and .arrow files as record batches of a few rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from mpidp.data.row_fields import shown_name
from mpidp.errors import DataError, UsageError

WITH_COLUMNS = ("parquet", "arrow")  # kinds of files from which single columns can be read (text_files.py)
BATCH_ROWS = 64
BUFFER_BYTES = 2**20  # read buffer of a column; without it, pyarrow reads whole row groups into memory
TOKENS = ("input_ids", "token_ids", "tokens")  # usual names of columns of token ids


@contextmanager
def reading_columns(path: str, kind: str) -> Iterator[None]:
    """Return a context for reading a file with pyarrow. In this context, an error of pyarrow becomes a DataError that names the
    file. `kind`: the suffix of the file. Errors name it. Raises UsageError if pyarrow is missing. Independent."""
    try:
        import pyarrow
    except ImportError:
        raise UsageError(f"{path}: reading .{kind} needs pyarrow. Run pip install 'mpidp[data]'") from None
    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the name of a column may not be UTF-8
        raise DataError(f"{path} is not a readable {kind} file ({error}). Replace or remove the file") from None


def record_batches(path: str, kind: str, columns: Collection[str]) -> Iterator[Any]:
    """Yield pyarrow record batches of at most BATCH_ROWS rows. Call this function inside reading_columns().

    `kind`: "parquet", or "arrow" for an Arrow file or an Arrow stream. `columns`: the columns to read. If it is empty, all
    columns are read. Raises DataError if a column is missing. Errors of pyarrow are not caught. Independent.
    """
    import pyarrow.ipc
    import pyarrow.parquet

    if kind == "parquet":
        with pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as table:
            _check_columns(path, table.schema_arrow.names, columns)
            yield from table.iter_batches(batch_size=BATCH_ROWS, columns=list(columns) or None)
        return
    with pyarrow.memory_map(path) as mapped:
        for batch in _batches(pyarrow, mapped):
            batch.validate(full=True)  # offsets in a damaged file may point outside the file
            _check_columns(path, batch.schema.names, columns)
            selected = batch.select(list(columns) or batch.schema.names)
            yield from (selected.slice(at, BATCH_ROWS) for at in range(0, batch.num_rows, BATCH_ROWS))


def _batches(pyarrow: Any, mapped: Any) -> Iterator[Any]:
    if mapped.read(6) == b"ARROW1":
        file = pyarrow.ipc.open_file(mapped)
        yield from (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        mapped.seek(0)
        yield from pyarrow.ipc.open_stream(mapped)


def _check_columns(path: str, names: Collection[str], wanted: Collection[str]) -> None:
    for name in wanted:
        if name not in names:
            there = ", ".join(map(shown_name, names))
            tokens = ". If a column holds token ids, use mpidp convert --from hf" if set(TOKENS) & set(names) else ""
            raise DataError(f"{path} has no column `{name}`, only {there}. Rename one of these columns to `{name}`, or "
                            f"give its name with --text-key{tokens}")

"""Reads and writes token datasets of Hugging Face. These are folders of Arrow files that save_to_disk wrote for a Dataset or a
DatasetDict, and .parquet files with a column of ids.

state.json lists the Arrow files of a Dataset. dataset_dict.json lists the splits of a DatasetDict. A row is a document, or a
part of a stream of tokens that was cut into rows of equal length. columns.py explains the other columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.formats.arrow import batch_blocks, pyarrow, read_ipc, read_parquet
from data_tools.formats.blocks import ReadOptions, SourcePart, TokenBlock
from data_tools.formats.columns import labels_of
from data_tools.formats.flat import head_of
from data_tools.formats.rows import file_below, read_json
from data_tools.formats.splits import files_in, in_splits
from data_tools.formats.stream import SplitTokens, whole_documents
from mpidp.errors import DataError

STATE, DICT = "state.json", "dataset_dict.json"
CACHED = ("cache-", "tmp")  # names of cached files that the package `datasets` leaves beside a dataset
SPLITS = {"train": "train", "val": "validation"}  # the names of the splits in Hugging Face's datasets


def find(source: Path, remarks: list[str]) -> list[SourcePart]:
    """Return the Arrow or parquet files of a source. Add remarks for the user to `remarks`. Raises DataError if there are no such
    files. Independent."""
    if (source / DICT).is_file():
        names = read_json(source / DICT).get("splits", [])
        folders = [file_below(source, name, source / DICT) for name in names]
        parts = in_splits(folders, source, remarks)
        return [SourcePart(path, part.split) for part in parts for path in _saved(part.path)]
    if (source / STATE).is_file():
        return [SourcePart(path) for path in _saved(source)]
    found = [path for path in files_in(source, "*.parquet", "*.arrow") if not path.name.startswith(CACHED) or path == source]
    return in_splits(found, source, remarks)


def _saved(folder: Path) -> list[Path]:
    """Return the Arrow files of a Dataset, in the order in which state.json lists them."""
    state = read_json(folder / STATE)
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: an old version of the package datasets saved this folder with a table of indices, which "
                        "mpidp does not apply. Load the dataset, call flatten_indices(), and save it again")
    try:
        found = [file_below(folder, one["filename"], folder / STATE) for one in state["_data_files"]]
    except (KeyError, TypeError):
        raise DataError(f"{folder / STATE} does not list the files of a dataset; restore it") from None
    if missing := [path for path in found if not path.exists()]:
        raise DataError(f"{missing[0]} is missing, but {STATE} lists it: copy the whole folder")
    return found


def read(path: Path, options: ReadOptions) -> Iterator[TokenBlock]:
    """Yield the rows of an Arrow or parquet file as blocks. Raises DataError if the file is damaged, or if no column holds ids.
    Independent."""
    batches = read_parquet(path, options) if head_of(path).startswith(b"PAR1") else read_ipc(path, path)
    yield from batch_blocks(batches, path, options)


def write(tokens: SplitTokens, out: Path) -> list[str]:
    """Write OUT/SPLIT-00000-of-00001.parquet, with one row per document. The column `input_ids` contains the ids. If there is
    a loss mask, the column `labels` contains the labels (see columns.py). The function load_dataset of Hugging Face's package
    `datasets` can load the folder. Return remarks for the user. Raises OSError if a file cannot be written. Independent."""
    path = out / f"{SPLITS.get(tokens.split, tokens.split)}-00000-of-00001.parquet"
    library = pyarrow(path)
    kinds = {"input_ids": library.list_(library.int32())}
    if tokens.has_loss_mask:
        kinds["labels"] = library.list_(library.int64())
    with library.parquet.ParquetWriter(path, library.schema(kinds), write_page_checksum=True) as writer:
        for block in whole_documents(tokens.blocks()):
            assert block.starts is not None
            ends = library.array(np.append(block.starts, len(block.ids)), library.int32())
            columns = [library.ListArray.from_arrays(ends, library.array(block.ids.astype(np.int32)))]
            if (labels := labels_of(block)) is not None:
                columns.append(library.ListArray.from_arrays(ends, library.array(labels)))
            writer.write_batch(library.record_batch(columns, schema=library.schema(kinds)))
    return []

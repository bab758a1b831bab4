"""The columns of rows that hold tokens: which column has the ids, and what masks and labels mean. Pure.

| column | meaning |
|---|---|
| input_ids, tokens, token_ids, ids (--column) | the ids of a row |
| labels | -100: the token is not in the loss; else the id itself. The model shifts them, as in transformers |
| loss_mask, label_mask, completion_mask, assistant_masks | 0: the token is not in the loss |
| attention_mask | 0: the token is padding and is left out; the numbers 1, 2, ... are the documents of a packed row (axolotl) |
| position_ids | a document of a packed row starts at each 0 |
| seq_lengths | the lengths of the documents of a packed row (TRL); only in Arrow and parquet files |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from data_tools.formats.blocks import ReadOptions, TokenBlock
from mpidp.data.row_fields import keys_of
from mpidp.errors import DataError

IDS = ("input_ids", "tokens", "token_ids", "ids")
LOSS_MASKS = ("loss_mask", "label_mask", "completion_mask", "assistant_masks")
OTHERS = ("labels", "attention_mask", "position_ids", *LOSS_MASKS)
PARTS = "seq_lengths"
IGNORED = -100  # the label of a token that is not in the loss


def id_column(names: Collection[str], options: ReadOptions, where: object) -> str:
    """Return the name of the column that holds the ids. Raises DataError if there is none. Pure."""
    found = [name for name in ([options.column] if options.column else IDS) if name in names]
    if not found:
        wanted = f"`{options.column}`" if options.column else "of token ids (input_ids)"
        raise DataError(f"{where}: there is no column {wanted}, only {keys_of(names)}: name it with --column. If a column "
                        "holds text, "
                        "use mpidp prepare")
    return found[0]


def wanted_columns(names: Collection[str], options: ReadOptions, where: object) -> list[str]:
    """Return the names of the columns to read: the ids first, then those that mask. Pure."""
    ids = id_column(names, options, where)
    return [ids, *(name for name in OTHERS if name in names and name != ids)]


def labels_of(block: TokenBlock) -> np.ndarray | None:
    """Return the labels of a block with a loss mask, (n,) int64: the id, or -100. None without a mask. Pure."""
    return None if block.mask is None else np.where(block.mask > 0, block.ids.astype(np.int64), IGNORED)


def block_of_rows(
    columns: Mapping[str, np.ndarray], lengths: np.ndarray, where: object, first_row: int, options: ReadOptions,
    parts: np.ndarray | None = None,
) -> TokenBlock:
    """Make a block of whole rows. Rows without tokens are counted in `options`.

    columns: the ids first; each of shape (n,), the values of all rows one after the other. lengths: (r,) values of each row.
    parts: where the documents of rows start, if this is stored. Raises DataError if labels are neither -100 nor the id, or if
    positions do not count from 0. Pure, except for `options`.
    """
    ids, *_ = columns.values()
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = np.zeros(len(ids) + 1, dtype=np.bool_)
    begins[ends - lengths] = True
    if parts is not None:
        begins[parts] = True
    begins = begins[: len(ids)]

    def row(at: int) -> int:
        return first_row + int(np.searchsorted(ends, at, side="right"))

    kept = columns["attention_mask"] != 0 if "attention_mask" in columns else np.ones(len(ids), dtype=np.bool_)
    if "attention_mask" in columns and (columns["attention_mask"] > 1).any():
        begins[1:] |= kept[1:] & (np.diff(columns["attention_mask"].astype(np.int64)) != 0)
    if "position_ids" in columns:
        positions = columns["position_ids"].astype(np.int64)
        goes_on = np.diff(positions, prepend=-1) == 1
        if (wrong := kept & ~begins & ~goes_on & (positions != 0)).any():
            at = int(np.argmax(wrong))
            raise DataError(f"{where}: row {row(at)} has the position {int(positions[at])} after {int(positions[at - 1])} in "
                            "`position_ids`. Positions must count from 0 in each document: correct or remove the column")
        begins |= kept & (positions == 0)
    masks = [columns[name] != 0 for name in LOSS_MASKS if name in columns]
    if "labels" in columns:
        labels = columns["labels"]
        learned = labels != IGNORED
        if (wrong := learned & (labels != ids)).any():
            at = int(np.argmax(wrong))
            raise DataError(f"{where}: row {row(at)} has the label {int(labels[at])} at the id {int(ids[at])}. A label must be "
                            "-100 or the id at the same place: correct the labels, or remove the column")
        masks.append(learned)
    mask = np.logical_and.reduce(masks).astype(np.uint8) if masks else None
    before = np.concatenate([[0], np.cumsum(kept)])
    options.skipped += int(np.count_nonzero(before[ends] == before[ends - lengths]))
    document = np.cumsum(begins)[kept]
    return TokenBlock(ids[kept], np.flatnonzero(np.diff(document, prepend=0)), None if mask is None else mask[kept])

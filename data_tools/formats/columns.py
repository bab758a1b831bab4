"""The columns of rows that hold tokens: which one has the ids, and what masks and labels mean. Pure.

| column | meaning |
|---|---|
| input_ids, tokens, token_ids, ids (--column) | the ids of a row |
| labels | -100: the token is not in the loss; else the id itself. The model shifts them, as in transformers |
| loss_mask, label_mask, completion_mask, assistant_masks | 0: the token is not in the loss |
| attention_mask | 0: the token is padding and is left out |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from data_tools.formats.blocks import ReadOptions, TokenBlock, starts_of
from mpidp.data.row_fields import keys_of
from mpidp.errors import DataError

IDS = ("input_ids", "tokens", "token_ids", "ids")
LOSS_MASKS = ("loss_mask", "label_mask", "completion_mask", "assistant_masks")
OTHERS = ("labels", "attention_mask", *LOSS_MASKS)
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


def block_of_rows(columns: Mapping[str, np.ndarray], lengths: np.ndarray, where: object, first_row: int) -> TokenBlock:
    """Make a block of whole rows.

    columns: the ids first; each of shape (n,), the values of all rows one after the other. lengths: (r,) values of each row.
    Raises DataError if labels are neither -100 nor the id. Pure.
    """
    ids, *_ = columns.values()
    masks = [columns[name] != 0 for name in LOSS_MASKS if name in columns]
    if "labels" in columns:
        labels = columns["labels"]
        learned = labels != IGNORED
        if (wrong := learned & (labels != ids)).any():
            at = int(np.argmax(wrong))
            row = first_row + int(np.searchsorted(np.cumsum(lengths), at, side="right"))
            raise DataError(f"{where}: row {row} has the label {int(labels[at])} at the id {int(ids[at])}. A label must be "
                            "-100 or the id "
                            "at the same place: correct the labels, or remove the column")
        masks.append(learned)
    mask = np.logical_and.reduce(masks).astype(np.uint8) if masks else None
    if "attention_mask" in columns and not (kept := columns["attention_mask"] != 0).all():
        ends = np.cumsum(lengths)
        before = np.concatenate([[0], np.cumsum(kept)])
        lengths = before[ends] - before[ends - lengths]
        ids, mask = ids[kept], None if mask is None else mask[kept]
    return TokenBlock(ids, starts_of(lengths), mask)

"""The meaning of the columns in datasets whose rows are tokens. A packed row has several documents. Pure.

| column | meaning |
|---|---|
| input_ids, tokens, token_ids, ids (--column) | the ids of a row |
| labels | -100: the token is not in the loss; else the id itself. The model shifts labels, as in transformers |
| loss_mask, label_mask, completion_mask, assistant_masks | 0: the token is not in the loss |
| attention_mask | 0: the token is padding and is left out; 1, 2, ...: the number of a packed row's document (axolotl) |
| segment_ids, sequence_ids, document_ids, seq_idx | a document of a packed row starts where the number changes. A token
with a number below 0 is padding. A token with 0 is padding if a larger number precedes it in the row |
| position_ids | a document of a packed row starts at each 0 |
| seq_lengths, seqlens | the lengths of the documents of a packed row (TRL) |
| cu_seqlens, cu_seq_lens, cu_seqlens_q, cu_seq_lens_q | the cumulative sums of the documents' lengths. The first is 0, and
the last is the length of the row |
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import numpy as np

from data_tools.formats.blocks import ReadOptions, TokenBlock
from mpidp.data.row_fields import keys_of, shown_name
from mpidp.errors import DataError

IDS = ("input_ids", "tokens", "token_ids", "ids")
LOSS_MASKS = ("loss_mask", "label_mask", "completion_mask", "assistant_masks")
SEGMENTS = ("segment_ids", "sequence_ids", "document_ids", "seq_idx")
MASKS = ("labels", "attention_mask", "position_ids", *LOSS_MASKS)
LENGTHS, SUMS = ("seq_lengths", "seqlens"), ("cu_seqlens", "cu_seq_lens", "cu_seqlens_q", "cu_seq_lens_q")
PARTS = (*LENGTHS, *SUMS)  # columns with a value for each document of a row; other columns have a value for each token
DIVIDERS = (*SEGMENTS, *PARTS)
BOUNDARIES = re.compile(r"seg|seq|doc|pos|bound|cu_|reset")  # found in names of columns that may divide packed rows
IGNORED = -100  # the label of a token that is not in the loss


def id_column(names: Collection[str], options: ReadOptions, where: object) -> str:
    """Return the name of the column that holds the ids. Raises DataError if there is no such column. `where`: the file that
    the error names. Pure."""
    found = [name for name in ([options.column] if options.column else IDS) if name in names]
    if not found:
        wanted = f"`{options.column}`" if options.column else "of token ids (input_ids)"
        raise DataError(f"{where}: there is no column {wanted}, only {keys_of(names)}. Name the column that holds the ids "
                        "with --column. If a column holds text, use mpidp prepare")
    return found[0]


def wanted_columns(names: Collection[str], options: ReadOptions, where: object, arrays: Collection[str]) -> list[str]:
    """Return the names of the columns to read. The ids come first. The other columns are those of the table above that mask
    tokens or show where the documents of a packed row start.

    `names`: all columns. `arrays`: the columns that hold arrays of numbers. Raises DataError if there is no column of ids. Also
    raises DataError if the name of an unknown column in `arrays` suggests document boundaries, such as `doc_bounds`. Pure.
    """
    ids = id_column(names, options, where)
    others = [name for name in names if name != ids and (name in MASKS or name in DIVIDERS and name in arrays)]
    for name in arrays:
        if name not in (ids, *others) and BOUNDARIES.search(name.lower()):
            raise DataError(f"{where}: the column `{shown_name(name)}` may show where the documents of packed rows "
                            "begin, but mpidp does not know its meaning. Write it as `position_ids` or `segment_ids`, or "
                            "remove it")
    return [ids, *others]


def part_starts(name: str, values: np.ndarray, counts: np.ndarray, lengths: np.ndarray, where: object, first: int) -> np.ndarray:
    """Return the document starts of packed rows, int64, from a column of lengths (LENGTHS) or of sums of lengths (SUMS).
    Positions are counted from the first token of the first row.

    `name`: name of the column. `values`: the values of the column in all r rows, one row after the other. `counts`: (r,) how
    many of these values each row has. `lengths`: (r,) number of tokens of each row. `first`: number of the first row,
    for error messages. Raises DataError if the values do not agree with `lengths`. Pure.
    """
    ends, bases = np.cumsum(counts), np.cumsum(lengths) - lengths
    of_row = np.repeat(np.arange(len(counts)), counts)
    values = values.astype(np.int64)
    if name in LENGTHS:
        before = np.concatenate([[0], np.cumsum(values)])
        wrong = before[ends] - before[ends - counts] != lengths
        wrong[of_row[values < 0]] = True
        starts = before[:-1]
    else:
        wrong = counts < 1
        full = ~wrong
        wrong[full] = (values[(ends - counts)[full]] != 0) | (values[ends[full] - 1] != lengths[full])
        falls = np.flatnonzero((np.diff(values) < 0) & (of_row[1:] == of_row[:-1]))
        wrong[of_row[falls]] = True
        starts = values + bases[of_row]
    if wrong.any():
        row = int(np.argmax(wrong))
        rule = "add up" if name in LENGTHS else "rise from 0"
        raise DataError(f"{where}: the values of `{name}` in row {first + row} do not {rule} to {int(lengths[row])}, the number "
                        "of tokens in this row. Correct or remove the column")
    return starts[starts < lengths.sum()]


def labels_of(block: TokenBlock) -> np.ndarray | None:
    """Return the labels of a block, (n,) int64. The label of a token is its id if the token is in the loss, else -100. Return
    None if the block has no loss mask. Pure."""
    return None if block.mask is None else np.where(block.mask > 0, block.ids.astype(np.int64), IGNORED)


def block_of_rows(
    columns: Mapping[str, np.ndarray], lengths: np.ndarray, where: object, first_row: int, options: ReadOptions,
    parts: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> TokenBlock:
    """Make a block of whole rows. Rows without tokens are counted in `options`. Pure, except for `options`.

    `columns`: the columns with a value for each token, by name, the ids first. Each column is an array (n,) with the values of
    all rows, one row after the other. `lengths`: (r,) number of tokens of each row. `parts`: the columns with a value for each
    document, by name. Each is a pair of arrays: the values of all rows, and the number of values of each row, (r,). `first_row`:
    number of the first row, for error messages.

    Raises DataError if a column does not hold integers, or if a label is neither -100 nor the id. Also raises DataError if
    positions do not count from 0 in each document, or if the lengths of documents do not add up to the length of their row.
    """
    columns = {name: _integers(name, values, where) for name, values in columns.items()}
    ids, *_ = columns.values()
    ends = np.cumsum(lengths, dtype=np.int64)
    of_rows = np.zeros(len(ids) + 1, dtype=np.bool_)
    of_rows[ends - lengths] = True
    of_rows = of_rows[: len(ids)]
    begins, kept = of_rows.copy(), np.ones(len(ids), dtype=np.bool_)
    for name, (values, counts) in parts.items():
        begins[part_starts(name, _integers(name, values, where), counts, lengths, where, first_row)] = True

    def row(at: int) -> int:
        return first_row + int(np.searchsorted(ends, at, side="right"))

    if "attention_mask" in columns:
        numbers = columns["attention_mask"].astype(np.int64)
        kept &= numbers != 0
        if (numbers > 1).any():
            begins |= kept & (np.diff(numbers, prepend=0) != 0)
    for name in (name for name in SEGMENTS if name in columns):
        numbers = columns[name].astype(np.int64)
        changes = np.diff(numbers, prepend=0) != 0
        kept &= (numbers > 0) | (numbers == 0) & ~_after_larger(numbers, of_rows)
        begins |= changes
    if "position_ids" in columns:
        positions = columns["position_ids"].astype(np.int64)
        goes_on = np.diff(positions, prepend=-1) == 1
        if (wrong := kept & ~begins & ~goes_on & (positions != 0)).any():
            at = int(np.argmax(wrong))
            raise DataError(f"{where}: row {row(at)} has the position {int(positions[at])} after {int(positions[at - 1])} in "
                            "`position_ids`. Positions must count from 0 in each document. Correct or remove the column")
        begins |= kept & (positions == 0)
    masks = [columns[name] != 0 for name in LOSS_MASKS if name in columns]
    if "labels" in columns:
        labels = columns["labels"]
        learned = labels != IGNORED
        if (wrong := learned & (labels != ids)).any():
            at = int(np.argmax(wrong))
            raise DataError(f"{where}: row {row(at)} has the label {int(labels[at])} for the id {int(ids[at])}. A label must be "
                            "-100 or the id at the same place. Correct the labels, or remove the column")
        masks.append(learned)
    mask = np.logical_and.reduce(masks).astype(np.uint8) if masks else None
    before = np.concatenate([[0], np.cumsum(kept)])
    options.skipped += int(np.count_nonzero(before[ends] == before[ends - lengths]))
    options.divided |= bool((begins & kept & ~of_rows).any())
    document = np.cumsum(begins)[kept]
    return TokenBlock(ids[kept], np.flatnonzero(np.diff(document, prepend=0)), None if mask is None else mask[kept])


def _after_larger(numbers: np.ndarray, of_rows: np.ndarray) -> np.ndarray:
    """Return (n,) bool: for each of the `numbers`, whether a number above 0 precedes it in its row. `of_rows`: (n,) bool, true
    where a row begins."""
    before = np.concatenate([[0], np.cumsum(numbers > 0)])[:-1]
    return before > np.maximum.accumulate(np.where(of_rows, before, 0))


def _integers(name: str, values: np.ndarray, where: object) -> np.ndarray:
    """Return the values of a column as integers. A mask may also have floats that are all 0 or 1. Raises DataError for other
    values."""
    if values.dtype.kind in "iub":
        return values
    if values.dtype.kind == "f" and name in ("attention_mask", *LOSS_MASKS):
        if (other := values[(values != 0) & (values != 1)]).size:
            raise DataError(f"{where}: the column `{name}` has the value {other[0]:g}, but a mask must have only the values 0 "
                            "and 1, because mpidp gives tokens no weights in the loss")
        return values.astype(np.uint8)
    raise DataError(f"{where}: the column `{name}` holds {values.dtype}, but ids, masks and labels are integers")

"""Reads and writes datatrove's token files, which nanotron reads. NAME.ds contains the ids. NAME.ds.index contains the end of
each document (uint64, in tokens).

NAME.ds.loss is optional. It has one byte per token, which is 0 if the token is not in the loss. NAME.ds.metadata has three
lines: the tokenizer and the bytes per token, separated by "|"; the number of tokens; this number in short form, such as 1.5
GT. (Source: datatrove, pipeline/tokens/tokenizer.py.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np

from data_tools.formats.blocks import ReadOptions, TokenBlock, read_array, readable, whole_array, with_starts
from data_tools.formats.flat import check_head, head_of, type_of_ids
from data_tools.formats.stream import SplitTokens
from mpidp.errors import DataError
from mpidp.runtime.files import open_regular

MAX_METADATA_BYTES = 2**16


def read(path: Path, options: ReadOptions) -> Iterator[TokenBlock]:
    """Yield the tokens of a .ds file as blocks. Raises DataError if the file does not agree with the files beside it.
    Independent."""
    head, index, loss = head_of(path), Path(f"{path}.index"), Path(f"{path}.loss")
    check_head(path, head)
    if not index.exists():
        raise DataError(f"{index} is missing: it holds the ends of the documents. Copy it, or write the data again with "
                        "save_index=True")
    size = os.stat(path).st_size
    kind = np.dtype(f"<u{_token_bytes(path, size)}") if _has_metadata(path) else type_of_ids(path, head, options)
    ends = whole_array(index, "<u8", unit="document ends").astype(np.int64)
    if len(ends) and (ends[0] < 0 or (np.diff(ends) < 0).any()):
        raise DataError(f"{index}: the ends of documents must not be negative or decrease. Copy this file and {path.name} again")
    if (last := int(ends[-1]) if len(ends) else 0) * kind.itemsize != size:
        raise DataError(f"{index}: the last document must end at {size // kind.itemsize}, the number of tokens in {path.name} "
                        f"({size} bytes, {kind.itemsize} for each token), but it ends at {last}. Copy both files again")
    lengths = np.diff(ends, prepend=0)
    pieces = read_array(path, kind)
    if not loss.exists():
        pairs: Iterator[tuple[np.ndarray, np.ndarray | None]] = zip(pieces, repeat(None))
    elif os.stat(loss).st_size != size // kind.itemsize:
        raise DataError(f"{loss} must have one byte per token, but it has {os.stat(loss).st_size} bytes, and {path.name} has "
                        f"{size // kind.itemsize} tokens. Copy both files again")
    else:
        pairs = zip(pieces, read_array(loss, "u1", unit="mask"), strict=True)
    if empty := int(np.count_nonzero(lengths == 0)):
        options.skipped += empty
    starts = (ends - lengths)[lengths > 0]
    yield from with_starts(((ids, None if mask is None else (mask != 0).astype(np.uint8)) for ids, mask in pairs), starts)


def _has_metadata(path: Path) -> bool:
    return Path(f"{path}.metadata").exists()


def _token_bytes(path: Path, size: int) -> int:
    """Return the number of bytes per token that NAME.ds.metadata states. `path`: NAME.ds. `size`: its size in bytes. Raises
    DataError if the metadata does not agree with `size`."""
    about = Path(f"{path}.metadata")
    with readable(about), open_regular(about) as file:
        lines = file.read(MAX_METADATA_BYTES).decode("utf-8", "replace").splitlines()
    width, tokens = (lines[0].rpartition("|")[2] if lines else ""), (lines[1] if lines[1:] else "")
    if width not in ("2", "4") or not tokens.isascii() or not tokens.isdigit() or int(tokens) * int(width) != size:
        raise DataError(f"{about}: it states {tokens or 'an unknown number of'} tokens of {width or 'an unknown number of'} "
                        f"bytes each, but {path.name} has {size} bytes. Copy both files again")
    return int(width)


def write(tokens: SplitTokens, out: Path) -> list[str]:
    """Write OUT/SPLIT/00000_unshuffled.ds and the files beside it. Return remarks for the user. Raises OSError if a file cannot
    be written. Independent."""
    folder, written = out / tokens.split, 0
    folder.mkdir()
    path = folder / "00000_unshuffled.ds"
    with open(path, "xb") as ids, open(f"{path}.index", "xb") as index:
        loss = open(f"{path}.loss", "xb") if tokens.has_loss_mask else None  # noqa: SIM115 - closed below
        for block in tokens.blocks():
            assert block.starts is not None
            ids.write(block.ids.astype(tokens.dtype).tobytes())
            ends = (block.starts + written)[written == 0 :]  # a start is the end of the previous document
            index.write(ends.astype("<u8").tobytes())
            if loss is not None and block.mask is not None:
                loss.write(block.mask.tobytes())
            written += len(block.ids)
        index.write(np.array([written], "<u8").tobytes())
        if loss is not None:
            loss.close()
    width = tokens.dtype.itemsize
    Path(f"{path}.metadata").write_text(f"mpidp {tokens.tokenizer_kind}|{width}\n{written}\n{_in_words(written)}")
    return []


def _in_words(tokens: int) -> str:
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if tokens >= 10**power:
            return f"{tokens / 10**power:.3g} {letter}T"
    return f"{tokens} T"

"""Reads and writes nanoGPT's train.bin and val.bin. Each file contains the ids of one split without a header, as uint16, or as
uint32 if the tokenizer has more than 65,536 ids. Documents are found by their end-of-document token.

meta.pkl, the pickled vocabulary of nanoGPT's character-level examples, is not read. (Source: nanoGPT,
data/openwebtext/prepare.py.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools.formats.blocks import ReadOptions, TokenBlock, read_array
from data_tools.formats.flat import check_head, head_of, type_of_ids
from data_tools.formats.stream import SplitTokens


def read(path: Path, options: ReadOptions) -> Iterator[TokenBlock]:
    """Yield the ids of a .bin file as blocks. Raises DataError if the file has another format. Independent."""
    head = head_of(path)
    check_head(path, head)
    yield from (TokenBlock(ids) for ids in read_array(path, type_of_ids(path, head, options)))


def write(tokens: SplitTokens, out: Path) -> list[str]:
    """Write OUT/SPLIT.bin. Return remarks for the user. Raises OSError if the file cannot be written. Independent."""
    with open(out / f"{tokens.split}.bin", "xb") as file:
        for block in tokens.blocks():
            file.write(block.ids.astype(tokens.dtype).tobytes())
    wide = tokens.dtype.itemsize > 2
    return ["the ids are uint32, because the tokenizer has more than 65,536 ids, but nanoGPT's train.py reads uint16"] * wide

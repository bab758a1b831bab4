"""Writes the tokens of shards in another format. The formats are listed in formats/table.py."""

from __future__ import annotations

from pathlib import Path

from data_tools.cut import ADVICE
from data_tools.formats.stream import SplitTokens
from data_tools.formats.table import FORMATS, IDS
from data_tools.new_folder import new_folder
from data_tools.progress import Ticker
from mpidp.data.shards import TokenStream
from mpidp.data.tokenizer import load_tokenizer
from mpidp.errors import DataError
from mpidp.runtime.files import writing
from mpidp.runtime.log import counted

PREFIXED = ("megatron",)  # formats for which OUT is not a folder, but the first part of the files' names


def to_tokens(name: str, shards: Path, out: Path) -> list[str]:
    """Write every split of `shards` in the format `name`. Return lines of text for the user: one about each split, then
    remarks.

    `out`: a folder that does not exist, or a prefix for Megatron-LM. A document that begins in the split "train" and ends in
    the split "val" becomes two documents. Raises UsageError if a file exists or cannot be written. Raises DataError if the
    shards are damaged, or have a loss mask that the format cannot store. After an error, no incomplete file is left.
    Independent.
    """
    kind = FORMATS[name]
    streams = [TokenStream(shards, split) for split in TokenStream(shards).index.splits]
    if any(stream.has_loss_mask for stream in streams) and not kind.masks:
        able = ", ".join(one for one, other in FORMATS.items() if other.masks)
        raise DataError(f"{shards} has a loss mask, which {kind.what} cannot store. A program that reads the output would "
                        f"train on the masked tokens. Choose one of the formats that store a loss mask: {able}")
    bos, ticker = load_tokenizer(shards).bos, Ticker("convert")
    splits = [SplitTokens(stream, bos, ticker) for stream in streams]
    if name in PREFIXED:
        remarks = [remark for split in splits for remark in kind.write(split, out)]
    else:
        with new_folder(out) as (new, _), writing(out, ADVICE):
            remarks = [remark for split in splits for remark in kind.write(split, new)]
    ticker.close()
    lines = []
    for split in splits:
        shown = f"{out}_{split.split}" if name in PREFIXED else f"{out}: {split.split}"
        lines.append(f"{shown}: {counted(split.tokens, 'token')}, {counted(split.documents, 'document')}")
    if kind.documents == IDS and not kind.masks and (lost := sum(split.lost for split in splits)):
        remarks.append(f"{kind.what} does not store where documents end. At {counted(lost, 'place')}, a program "
                       "that finds documents by their end-of-document token will find different boundaries than mpidp")
    return lines + list(dict.fromkeys(remarks))

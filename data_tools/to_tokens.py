"""Write the tokens of shards in a format of the table (formats/table.py)."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from data_tools.cut import ADVICE
from data_tools.formats.stream import SplitTokens
from data_tools.formats.table import FORMATS, IDS, TokenFormat
from data_tools.progress import Ticker
from mpidp.data.shards import TokenStream
from mpidp.data.tokenizer import load_tokenizer
from mpidp.errors import DataError, UsageError
from mpidp.runtime.files import writing
from mpidp.runtime.log import counted

PREFIXED = ("megatron",)  # formats whose OUT is the first part of the files' names, not a folder


def to_tokens(name: str, shards: Path, out: Path) -> list[str]:
    """Write every split in a format; return a line of text about each split, and remarks.

    out: a folder that does not exist, or for Megatron-LM a prefix. A document that begins in train and ends in val becomes two
    documents. Raises UsageError if a file exists or cannot be written. Raises DataError if the shards are damaged or have a loss
    mask that the format cannot store. Nothing is then left. Independent.
    """
    kind = FORMATS[name]
    streams = [TokenStream(shards, split) for split in TokenStream(shards).index.splits]
    if any(stream.has_loss_mask for stream in streams) and not kind.masks:
        able = ", ".join(one for one, other in FORMATS.items() if other.masks)
        raise DataError(f"{shards} has a loss mask, which {kind.what} cannot store: the masked tokens would be trained on. "
                        "Formats that store "
                        f"one are {able}")
    bos, ticker = load_tokenizer(shards).bos, Ticker("convert")
    splits = [SplitTokens(stream, bos, ticker) for stream in streams]
    if name in PREFIXED:
        remarks = [remark for split in splits for remark in kind.write(split, out)]
    else:
        remarks = _in_folder(kind, splits, out)
    ticker.close()
    lines = []
    for split in splits:
        shown = f"{out}_{split.split}" if name in PREFIXED else f"{out}: {split.split}"
        lines.append(f"{shown}: {counted(split.tokens, 'token')}, {counted(split.documents, 'document')}")
    if kind.documents == IDS and not kind.masks and (lost := sum(split.lost for split in splits)):
        remarks.append(f"{kind.what} does not store where documents end; at {counted(lost, 'place')} the end-of-document "
                       "tokens differ from the ends of the documents")
    return lines + list(dict.fromkeys(remarks))


def _in_folder(kind: TokenFormat, splits: list[SplitTokens], out: Path) -> list[str]:
    """Write to a temporary folder, and give it the name OUT when it is complete."""
    if out.exists():
        raise UsageError(f"{out} exists and is not overwritten: choose another folder, or remove it yourself")
    with writing(out, "choose another folder"):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}."))
    try:
        with writing(out, ADVICE):
            new = scratch / "new"
            new.mkdir()
            remarks = [remark for split in splits for remark in kind.write(split, new)]
            os.rename(new, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return remarks

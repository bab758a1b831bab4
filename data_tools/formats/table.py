"""The table of the token formats that convert reads and writes. To add a format, add a file to this folder and a row to the
table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.formats import datatrove, hf, litdata, llmc, mds, megatron, nanogpt, olmo
from data_tools.formats.blocks import ReadOptions, SourcePart, TokenBlock
from data_tools.formats.flat import OTHERS, head_of
from data_tools.formats.splits import finder, visible
from data_tools.formats.stream import SplitTokens
from mpidp.errors import DataError

STORED, ROWS, IDS = "stored", "rows", "ids"  # how documents are found: stored by the format; one per row; by special tokens


@dataclass(frozen=True)
class TokenFormat:
    """A format of tokens: how to recognize, read and write it."""

    what: str  # the name of the format in messages
    documents: str  # STORED, ROWS or IDS
    recognize: Callable[[Path], bool]  # whether a file or folder looks like this format
    find: Callable[[Path, list[str]], list[SourcePart]]  # returns the parts of a source, and adds remarks
    read: Callable[[Path, ReadOptions], Iterator[TokenBlock]]  # yields the tokens of one part
    write: Callable[[SplitTokens, Path], list[str]]  # writes one split, and returns remarks
    masks: bool = False  # whether the format can store a loss mask
    eod_first: bool = False  # whether programs usually write the end-of-document token before each document of this format
    goes_on: bool = False  # whether a document may continue in the next file


def _any(source: Path, pattern: str, accept: Callable[[Path], bool] = lambda path: True) -> bool:
    """Return whether a file of the source matches `pattern` and accept(file) is true. If the source is a folder, only the first
    matching file that visible() finds is examined."""
    if source.is_dir():
        found = visible(source, pattern)
        return bool(found) and accept(found[0])
    return source.is_file() and source.match(pattern) and accept(source)


def _is_hf(source: Path) -> bool:
    return any((source / name).is_file() for name in (hf.STATE, hf.DICT)) or any(
        _any(source, pattern) for pattern in ("*.parquet", "*.arrow"))


def _is_megatron(source: Path) -> bool:
    def accept(path: Path) -> bool:
        return head_of(path).startswith(megatron.MAGIC)

    beside = source.with_suffix(".idx") if source.suffix == ".bin" else source.with_name(f"{source.name}.idx")
    return _any(source, "*.idx", accept) or any(
        path.is_file() and accept(path) for path in (beside, source.with_name(f"{source.name}_train.idx")))


def _is_plain(path: Path) -> bool:
    head = head_of(path)
    return not any(head.startswith(magic) for magic, *_ in OTHERS)


def _has_index(of: Callable[[Path], bool]) -> Callable[[Path], bool]:
    return lambda source: _any(source, "index.json", lambda path: of(path.parent))


FORMATS = {  # in the order in which formats are tried
    "megatron": TokenFormat("Megatron-LM's .bin and .idx", STORED, _is_megatron, megatron.find, megatron.read, megatron.write),
    "datatrove": TokenFormat("datatrove's .ds", STORED, lambda source: _any(source, "*.ds"), finder("*.ds"), datatrove.read,
                             datatrove.write, masks=True),
    "mds": TokenFormat("MDS of MosaicML Streaming", ROWS, _has_index(mds.is_one), mds.find, mds.read, mds.write,
                       masks=True),
    "litdata": TokenFormat("LitData's chunks", ROWS, _has_index(litdata.is_one), litdata.find, litdata.read,
                           litdata.write, masks=True),
    "hf": TokenFormat("Hugging Face's Arrow folders and .parquet", ROWS, _is_hf, hf.find, hf.read, hf.write, masks=True),
    "olmo": TokenFormat("OLMo's .npy", IDS, lambda source: _any(source, "*.npy"), olmo.find, olmo.read, olmo.write, masks=True),
    "llmc": TokenFormat("llm.c's .bin", IDS, lambda source: _any(source, "*.bin", llmc.is_one), finder("*.bin"), llmc.read,
                        llmc.write, eod_first=True, goes_on=True),
    "nanogpt": TokenFormat("nanoGPT's .bin", IDS, lambda source: _any(source, "*.bin", _is_plain), finder("*.bin"), nanogpt.read,
                           nanogpt.write, goes_on=True),
}


KINDS = ((".bin", ".idx"), (".ds",), (".mds",), (".npy",), (".parquet", ".arrow"))  # suffixes of files with tokens


def mixed(source: Path) -> list[str]:
    """Return the kinds of files with tokens that a folder contains. Each kind is named by one suffix, such as ".ds".
    Independent."""
    found = ([end for end in ends if _any(source, f"*{end}")] for ends in KINDS) if source.is_dir() else ()
    return [ends[0] for ends in found if ends]


def recognized(source: Path) -> str | None:
    """Return the name of the format that a source seems to have, or None if it has none of the formats. Independent."""
    for name, one in FORMATS.items():
        try:
            if one.recognize(source):
                return name
        except DataError:
            continue
    return None

"""Reads index.json, which describes a folder of shards, and validates it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpidp.errors import DataError
from mpidp.runtime.files import open_regular
from mpidp.runtime.json_file import parse_json

INDEX_FORMAT = "mpidp-shards"
VERSION = 1
MAX_INDEX_BYTES = 256 * 2**20
# Other keys are rejected: a key may be damaged, or a newer version may have written a key that changes how the data are read.
_KEYS = {
    "index": {"format", "version", "vocab_size", "eod", "window", "special_tokens", "tokenizer", "source", "splits", "files"},
    "split": {"tokens", "documents", "text_bytes", "loss_mask"},
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.h5")  # excludes folders, hidden files and ".."


@dataclass(frozen=True)
class FileRecord:
    """The entry of one shard in the index."""

    name: str
    split: str
    tokens: int
    documents: int  # number of documents that start in this file
    text_bytes: int  # number of UTF-8 bytes of the text
    size: int  # size of the file in bytes
    crc32: str
    sha256: str


@dataclass(frozen=True)
class SplitRecord:
    """The entry of one split in the index, with the totals of the split's shards."""

    tokens: int
    documents: int
    text_bytes: int
    loss_mask: bool  # whether the split's shards have a loss mask


@dataclass(frozen=True)
class Index:
    """The validated contents of an index.json."""

    vocab_size: int
    eod: int  # end-of-document id
    tokenizer_kind: str
    tokenizer_sha256: str
    splits: dict[str, SplitRecord]
    files: list[FileRecord]
    source: dict[str, Any]
    sha256: str = ""  # sha256 of index.json itself
    window: int = 0  # if packed: no document crosses a multiple of this many tokens; 0: not packed
    special_tokens_sha256: str = ""  # sha256 of special_tokens.json; "": there is no such file

    def tokenizer_bytes(self, folder: Path) -> bytes:
        """Return the contents of tokenizer.json. Raises DataError if the file is missing or has changed."""
        return _content(folder, "tokenizer.json", self.tokenizer_sha256)

    def special_tokens_bytes(self, folder: Path) -> bytes | None:
        """Return the contents of special_tokens.json (special_tokens.py), or None if the shards were prepared without this file.
        Raises DataError if they were prepared with it, but it is missing now or has changed."""
        return _content(folder, "special_tokens.json", self.special_tokens_sha256) if self.special_tokens_sha256 else None

    def to_json(self) -> str:
        """Return the contents of index.json. Equal shards have equal contents."""
        tokenizer = {"kind": self.tokenizer_kind, "file": "tokenizer.json", "sha256": self.tokenizer_sha256}
        optional: dict[str, Any] = {"window": self.window} if self.window else {}
        if self.special_tokens_sha256:
            optional["special_tokens"] = {"file": "special_tokens.json", "sha256": self.special_tokens_sha256}
        return json.dumps({
            "format": INDEX_FORMAT, "version": VERSION, "vocab_size": self.vocab_size, "eod": self.eod,
            **optional, "tokenizer": tokenizer, "source": self.source, "splits": {k: asdict(v) for k, v in self.splits.items()},
            "files": [asdict(record) for record in self.files],
        }, indent=1) + "\n"


def read_index(folder: Path, name: str = "index.json", shown: str = "") -> Index:
    """Read the index of a folder of shards. `name`: the name of the index file. `shown`: the name of the folder in error messages
    (default: `folder`). Raises DataError if the index is missing or invalid. Independent."""
    path = folder / name
    named = f"{shown or folder}/{name}"
    try:
        with open_regular(path) as file:
            data = file.read(MAX_INDEX_BYTES + 1)
        raw = parse_json(data) if len(data) <= MAX_INDEX_BYTES else None
    except OSError as error:
        raise DataError(f"no shards at {folder}: cannot read {named} ({error.strerror}). "
                        f"Prepare shards with python -m data_tools.prepare --out {folder}") from None
    except ValueError as error:
        raise DataError(f"{named} is not valid JSON ({error}). Prepare the shards again") from None
    try:
        return _parse(raw, hashlib.sha256(data).hexdigest())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{named} is not a valid shard index: {problem}. Prepare the shards again") from None


def _content(folder: Path, name: str, sha256: str) -> bytes:
    """Return the contents of a file in the folder. Raises DataError if the file cannot be read, or if its contents do not have
    this sha256."""
    path = folder / name
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Restore the file, or prepare {folder} again") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path} has changed since index.json was written. Restore the file, or prepare {folder} again")
    return content


def _parse(raw: Any, sha256: str) -> Index:
    if not isinstance(raw, dict) or raw.get("format") != INDEX_FORMAT:
        raise ValueError(f'its format is not "{INDEX_FORMAT}"')
    if raw.get("version") != VERSION:
        raise ValueError(f"its version is {raw.get('version')!r}, but this mpidp reads version {VERSION}")
    for what, found in [("index", raw), *(("split", split) for split in raw["splits"].values())]:
        if unknown := sorted(set(found) - _KEYS[what]):
            raise ValueError(f"{unknown[0]!r} is not a key of {'an index' if what == 'index' else 'a split'}")
    tokenizer = raw["tokenizer"]
    splits = {
        str(name): SplitRecord(_count(split, "tokens", 1), _count(split, "documents"), _count(split, "text_bytes"),
                               _truth(split, "loss_mask"))
        for name, split in raw["splits"].items()
    }
    files = [
        FileRecord(_text(f, "name"), _text(f, "split"), _count(f, "tokens", 1), _count(f, "documents"),
                   _count(f, "text_bytes"), _count(f, "size", 1), _text(f, "crc32"), _text(f, "sha256"))
        for f in raw["files"]
    ]
    index = Index(_count(raw, "vocab_size", 1, 2**32), _count(raw, "eod"), _text(tokenizer, "kind"),
                  _text(tokenizer, "sha256"), splits, files, dict(raw.get("source") or {}), sha256,
                  _count(raw, "window") if "window" in raw else 0,
                  _text(raw["special_tokens"], "sha256") if "special_tokens" in raw else "")
    if index.eod >= index.vocab_size:
        raise ValueError(f"eod must be below vocab_size {index.vocab_size}, but is {index.eod}")
    names = [record.name for record in files]
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a plain file name ending in .h5")
    if len({name.lower() for name in names}) != len(names):
        raise ValueError("it lists a file twice")
    for name, split in splits.items():
        of_split = [record for record in files if record.split == name]
        for key in ("tokens", "documents", "text_bytes"):
            if sum(getattr(record, key) for record in of_split) != getattr(split, key):
                raise ValueError(f"`{key}` of split {name!r} is not the sum of `{key}` of its files")
    if unlisted := {record.split for record in files} - set(splits):
        raise ValueError(f"some files belong to split {unlisted.pop()!r}, which is not in the list of splits")
    return index


def _count(raw: dict[str, Any], key: str, least: int = 0, most: int = 2**62) -> int:
    value = raw[key]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key} must be an integer in {least}..{most}, but is {value!r}")
    return value


def _truth(raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, but is {value!r}")
    return value


def _text(raw: dict[str, Any], key: str) -> str:
    value = raw[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} {value!r} must be a string")
    return value

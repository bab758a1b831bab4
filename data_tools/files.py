"""Finds the files of a source, and returns them in a fixed order. Links to folders are followed, but each folder is read only
once."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from data_tools.formats.splits import split_of
from mpidp.data.text_files import kind_of
from mpidp.errors import DataError
from mpidp.runtime.files import open_regular
from mpidp.runtime.json_file import parse_json

NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests"})
MAX_SHOWN = 5  # largest number of links that a message names
MAX_STATE_BYTES = 2**26  # largest size of state.json in bytes
# datasets that prepare does not read:
# (pattern of the files, pattern of another file in the same folder, name of the format, what to do)
DATASETS = (
    ("dataset_dict.json", "*", "a DatasetDict of Hugging Face datasets", "Give the folder of one of its splits, for example "
     "--source {folder}/train"),
    ("*.mds*", "index.json", "a dataset of MosaicML Streaming", "If its samples are token ids, use mpidp convert --from mds "
     "{folder} --out DIR --tokenizer PATH. If its samples are texts, write them to a .jsonl file with a loop over "
     "streaming.LocalDataset('{folder}')"),
    ("chunk-*.bin*", "index.json", "a dataset of LitData", "If its samples are token ids, use mpidp convert --from litdata "
     "{folder} --out DIR --tokenizer PATH. If its samples are texts, write them to a .jsonl file with a loop over "
     "litdata.StreamingDataset('{folder}')"),
    ("*.ds", "*.ds.*", "token files of datatrove", "Use mpidp convert --from datatrove {folder} --out DIR --tokenizer PATH"),
    ("*.bin", "*.idx", "token files of Megatron-LM", "Use mpidp convert --from megatron {folder} --out DIR --tokenizer PATH"),
    ("token_ids_part_*.npy", "*", "token files of OLMo", "Use mpidp convert --from olmo {folder} --out DIR --tokenizer PATH"),
)
CACHED = "cache-*.arrow"  # cached results, which the package `datasets` keeps beside a dataset
SAVED, ABOUT = "state.json", ("dataset_info.json", "state.json")  # files of a dataset that save_to_disk wrote


@dataclass(frozen=True)
class SourceFile:
    """A file of a source of text."""

    name: str  # path relative to the source, with "/"
    path: str
    size: int  # in bytes


def find_files(source: str, leave_out: Path) -> tuple[list[SourceFile], dict[str, Any], list[str]]:
    """Return (files, about, remarks). files: the files of a source, in a fixed order. about: a description of the source for
    index.json. remarks: lines for the user. Independent.

    `source`: "stdlib", a file, or a folder. All folders below a folder are read, too. Hidden files, hidden folders and the folder
    `leave_out` are left out. Raises DataError if the source is missing, unreadable or empty. Also raises DataError if it contains
    a dataset in a format that prepare does not read.
    """
    root = Path(sysconfig.get_paths()["stdlib"] if source == "stdlib" else source)
    links: list[str] = []
    try:
        if source == "stdlib":
            files = [f for f in _walk(root, leave_out, NOT_STDLIB, []) if f.name.endswith(".py")]
            sha256 = hashlib.sha256()
            for f in files:
                sha256.update(f.name.encode() + b"\0" + str(f.size).encode() + b"\0" + Path(f.path).read_bytes())
            about: dict[str, Any] = {"kind": "stdlib", "python": sys.version.split()[0], "sha256": sha256.hexdigest()}
        elif root.is_dir():
            files, about = _walk(root, leave_out, frozenset(), links), {"kind": "folder", "name": root.resolve().name}
        else:
            files = [SourceFile(root.name, str(root), os.stat(root).st_size)]
            about = {"kind": "file", "name": root.name}
    except OSError as error:
        raise DataError(f"the source {error.filename or source} cannot be read ({error.strerror}). "
                        "Give --source an existing, readable file or folder") from None
    if not files:
        raise DataError(f"the source {root} holds no files. Give --source a file or folder with text")
    return files, about | {"files": len(files), "bytes": sum(f.size for f in files)}, _remarks(root, files, links)


def _walk(root: Path, leave_out: Path, skipped: frozenset[str], outside: list[str]) -> list[SourceFile]:
    """Return the files below the folder `root`. Add the links that point outside this folder to `outside`.

    `skipped`: names of folders that are left out. Links to folders are followed only if `skipped` is empty, and after all
    other folders, so that a folder which can also be reached without a link is read under its own path. A link to a
    folder that contains `root` is never followed.
    """
    real = os.path.realpath(root)
    seen = {_identity(folder) for folder in Path(real).parents}
    found, starts = [], [str(root)]

    def stop(error: OSError) -> None:
        raise error

    def is_outside(path: str) -> bool:
        return os.path.islink(path) and os.path.commonpath([os.path.realpath(path), real]) != real

    for start in starts:  # the loop appends to this list
        for folder, folders, names in os.walk(start, onerror=stop):
            if _identity(folder) in seen:
                folders.clear()
                continue
            seen.add(_identity(folder))
            folders[:] = sorted(d for d in folders if not d.startswith(".") and d not in skipped
                                and os.path.realpath(os.path.join(folder, d)) != os.path.realpath(leave_out))
            linked = [path for d in folders if os.path.islink(path := os.path.join(folder, d))] if not skipped else []
            starts += linked
            shown = _text_files(folder, [name for name in names if not name.startswith(".")])
            paths = [os.path.join(folder, name) for name in sorted(shown)]
            outside += [path for path in linked + paths if is_outside(path)]
            found += [SourceFile(os.path.relpath(path, root).replace(os.sep, "/"), path, os.stat(path).st_size) for path in paths]
    return _each_once(sorted(found, key=lambda f: os.fsencode(f.name)))


def _each_once(files: list[SourceFile]) -> list[SourceFile]:
    """Return the files without duplicates. A link is left out if its target is also in the list. If several links point to one
    file outside the list, only the first link is kept."""
    seen, kept = {os.path.realpath(f.path) for f in files if not os.path.islink(f.path)}, []
    for f in files:
        if not os.path.islink(f.path):
            kept.append(f)
        elif (real := os.path.realpath(f.path)) not in seen:
            seen.add(real)
            kept.append(f)
    return kept


def _identity(folder: str | Path) -> tuple[int, int]:
    about = os.stat(folder)
    return about.st_dev, about.st_ino


def _text_files(folder: str, names: list[str]) -> list[str]:
    """Return the names of those files of a folder that may contain text. `names`: the names of its files. If save_to_disk
    wrote the folder, return only the Arrow files that state.json lists.

    Raises DataError if the folder has a dataset in a format that prepare does not read.
    """
    for files, beside, what, way in DATASETS:
        data = [name for name in names if fnmatch(name, files)]
        if data and any(fnmatch(name, beside) for name in names):
            raise DataError(f"{folder} is {what} ({min(data)}), which prepare does not read. {way.format(folder=folder)}")
    if not any(name.endswith(".arrow") for name in names):
        return names
    path = os.path.join(folder, SAVED)
    if SAVED not in names:
        return [name for name in names if name not in ABOUT and not fnmatch(name, CACHED)]
    try:
        with open_regular(path) as file:
            state = parse_json(file.read(MAX_STATE_BYTES))
        listed, selects = [str(one["filename"]) for one in state["_data_files"]], bool(state.get("_indices_data_files"))
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path} does not list the files of a dataset of Hugging Face. Restore this file, or remove it to "
                        "read all files of the folder") from None
    if selects:
        raise DataError(f"{folder}: an old version of the package datasets saved this folder with a table of indices, which "
                        "mpidp does not apply. Load the dataset, call flatten_indices(), and save it again")
    if missing := [name for name in listed if name not in names]:
        raise DataError(f"{os.path.join(folder, missing[0])} is missing, but {SAVED} lists it: copy the whole folder")
    return [name for name in names if name in listed or not name.endswith(".arrow") and name not in ABOUT]


def _remarks(root: Path, files: list[SourceFile], links: list[str]) -> list[str]:
    return _of_links(root, links) + _of_splits(files)


def _of_splits(files: list[SourceFile]) -> list[str]:
    """Return a list with one remark if the names of the row files show several splits, such as train-0.parquet and
    test-0.parquet. All these files are read together. Otherwise return []."""
    rows = [f.name for f in files if kind_of(f.name)[0] != "text"]
    splits = {name: split_of(Path(name).name) for name in rows}
    others = [name for name, split in splits.items() if split != "train"]
    if not others or not any("train" in Path(name).name.lower() for name in rows):
        return []
    return [f"files of several splits were read together, for example {others[0]}. To train on one split only, give --source "
            "the files of this split"]


def _of_links(root: Path, links: list[str]) -> list[str]:
    if not links:
        return []
    shown = ", ".join(f"{path} -> {os.path.realpath(path)}" for path in links[:MAX_SHOWN])
    return [f"{len(links):,} links point outside {root} and were followed: {shown}{', ...' if links[MAX_SHOWN:] else ''}"]

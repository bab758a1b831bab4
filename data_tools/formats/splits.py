"""Determines the split to which a file or folder of a dataset belongs. The words of its name show the split. Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from data_tools.formats.blocks import SourcePart
from mpidp.errors import DataError

VALIDATION = ("val", "validation", "valid", "dev", "eval", "evaluation")  # words that name the split "val"
SUBSETS = ("_small", "_xsmall")  # ends of the names of folders in which LLM Foundry repeats a part of a split
TEST = "test"
WORD = re.compile(r"[^a-z0-9]+|(?<=[a-z])(?=[0-9])")


def split_of(name: str) -> str:
    """Return the split that the words of a file name suggest: "val", "test" or "train". For example, the split of
    data/validation-00000-of-00001.parquet is "val". Pure."""
    words = set(WORD.split(name.lower()))
    return "val" if words & set(VALIDATION) else TEST if TEST in words and "train" not in words else "train"


def in_splits(paths: Iterable[Path], root: Path, remarks: list[str]) -> list[SourcePart]:
    """Assign the files or folders of a dataset to the splits "train" and "val". Leave out the split "test", and folders that
    repeat a part of another folder (SUBSETS). Add a remark about what was left out to `remarks`.

    `root`: the folder of the dataset, whose own name is ignored. Raises DataError if nothing is left for training. Pure.
    """
    all_paths = list(paths)
    again = {path for path in all_paths for end in SUBSETS
             if path.name.endswith(end) and path.with_name(path.name.removesuffix(end)) in all_paths}
    paths = [path for path in all_paths if path not in again]
    if again:
        remarks.append(f"{', '.join(sorted(path.name for path in again))}: left out, because other folders contain the same "
                       "samples")
    named = [(path, split_of(path.relative_to(root).as_posix() if path != root else "")) for path in paths]
    left_out = [path for path, split in named if split == TEST]
    if left_out:
        remarks.append(f"{len(left_out)} of {len(named)} files or folders belong to a test split and were left out, for "
                       f"example {left_out[0]}")
    parts = [SourcePart(path, split) for path, split in named if split != TEST]
    if not any(part.split == "train" for part in parts):
        only = [part.path for part in parts] or left_out
        raise DataError(f"{root} has no training data, only {only[0].relative_to(root)}{' and others' * (len(only) > 1)}. To "
                        "train on one of these, give the file or folder itself as the source")
    return parts


def folders_with_index(
    source: Path, is_one: Callable[[Path], bool], program: str, writer: str, remarks: list[str]
) -> list[SourcePart]:
    """Return the folders whose index.json is_one(folder) accepts, each with its split. `source`: a folder, or an index.json.
    `program`, `writer`: names of the program that reads such folders and of the program that writes them. Errors show these
    names. Raises DataError if there are no such folders. Independent."""
    folder = source.parent if source.name == "index.json" else source
    parts = [path.parent for path in files_in(folder, "index.json") if is_one(path.parent)]
    if not parts:
        raise DataError(f"{source} holds no index.json of {program}: give the folder that {writer} wrote")
    return in_splits(parts, folder, remarks)


def visible(source: Path, *patterns: str) -> list[Path]:
    """Return the sorted files in a folder, and in the folders below it, whose names match one of the patterns. Hidden files and
    the files in hidden folders are left out. Links to folders are followed last, and each folder is read once. A link to a folder
    that contains `source` is not followed. Independent."""
    seen, found, starts = {_identity(folder) for folder in source.resolve().parents}, set[Path](), [source]
    for start in starts:  # the loop appends to this list
        for folder, folders, names in os.walk(start):
            if _identity(folder) in seen:
                folders.clear()
                continue
            seen.add(_identity(folder))
            folders[:] = [name for name in folders if not name.startswith(".")]
            starts += sorted(path for name in folders if (path := Path(folder, name)).is_symlink())
            shown = [name for name in names if not name.startswith(".")]
            found |= {Path(folder, name) for name in shown if any(fnmatchcase(name, pattern) for pattern in patterns)}
    return sorted(path for path in found if path.is_file())


def _identity(folder: str | Path) -> tuple[int, int]:
    about = os.stat(folder)
    return about.st_dev, about.st_ino


def files_in(source: Path, *patterns: str) -> list[Path]:
    """Return [source] if the source is a file. If it is a folder, return the files that visible() finds. Raises DataError if
    there are no such files. Independent."""
    if source.is_dir():
        if not (found := visible(source, *patterns)):
            raise DataError(f"{source} holds no file {' or '.join(patterns)}: give the folder or the file that has the tokens")
        return found
    if not source.exists():
        raise DataError(f"{source} does not exist: give an existing file or folder")
    return [source]


def finder(pattern: str) -> Callable[[Path, list[str]], list[SourcePart]]:
    """Return a function find(source, remarks), which returns the files of a source whose names match `pattern`, each with its
    split. See files_in() and in_splits(). Pure."""
    return lambda source, remarks: in_splits(files_in(source, pattern), source, remarks)

"""Find the files of a source in a fixed order. Linked folders are followed, each folder once."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mpidp.errors import DataError

NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests"})
MAX_SHOWN = 5  # most links that a message names
# formats that mpidp cannot read: (pattern of the files, pattern of another file in the same folder, name of the format, how to
# convert the data to text)
DATASETS = (
    ("*.arrow", "*", "a dataset saved by save_to_disk of Hugging Face datasets",
     "python -c \"from datasets import load_from_disk; load_from_disk('{folder}').to_json('rows.jsonl')\" "
     "(for a DatasetDict: the folder of a split)"),
    ("*.mds*", "index.json", "a dataset of MosaicML Streaming", "write the text of its samples to a .jsonl file, one "
     "{{\"text\": ...}} per line: for sample in streaming.LocalDataset('{folder}')"),
    ("chunk-*.bin*", "index.json", "a dataset of LitData", "write the text of its samples to a .jsonl file, one "
     "{{\"text\": ...}} per line: for sample in litdata.StreamingDataset('{folder}')"),
    ("*.ds", "*.ds.*", "token files of datatrove", "run the pipeline again with a JsonlWriter in place of its tokenizer"),
    ("*.bin", "*.idx", "token files of Megatron-LM", "mpidp convert --from megatron (mpidp convert --help)"),
)


@dataclass(frozen=True)
class SourceFile:
    """A file of a source."""

    name: str  # relative to the source, with "/"
    path: str
    size: int  # in bytes


def find_files(source: str, leave_out: Path) -> tuple[list[SourceFile], dict[str, Any], list[str]]:
    """Return the files of a source in a fixed order, a description of it for index.json, and remarks for the user. Independent.

    source: "stdlib", a file or a folder (recursive; hidden files and leave_out are skipped). Raises DataError if
    the source is missing, unreadable or empty, or holds a dataset in a format that is not read.
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
        raise DataError(f"cannot read the source {error.filename or source}: {error.strerror}; "
                        "give --source an existing, readable file or folder") from None
    if not files:
        raise DataError(f"the source {root} holds no files; give --source a file or folder with text")
    return files, about | {"files": len(files), "bytes": sum(f.size for f in files)}, _remarks(root, links)


def _walk(root: Path, leave_out: Path, skipped: frozenset[str], outside: list[str]) -> list[SourceFile]:
    """Return the files below a folder, and add to `outside` the links that lead out of it.

    Linked folders are read after all others, and only if no other path led there. A link to a folder that contains the source is
    not followed. skipped: names of folders that are left out; if there are any, no linked folder is followed.
    """
    real = os.path.realpath(root)
    seen = {_identity(folder) for folder in Path(real).parents}
    found, starts = [], [str(root)]

    def stop(error: OSError) -> None:
        raise error

    def is_outside(path: str) -> bool:
        return os.path.islink(path) and os.path.commonpath([os.path.realpath(path), real]) != real

    for start in starts:  # grows
        for folder, folders, names in os.walk(start, onerror=stop):
            if _identity(folder) in seen:
                folders.clear()
                continue
            seen.add(_identity(folder))
            folders[:] = sorted(d for d in folders if not d.startswith(".") and d not in skipped
                                and os.path.realpath(os.path.join(folder, d)) != os.path.realpath(leave_out))
            linked = [path for d in folders if os.path.islink(path := os.path.join(folder, d))] if not skipped else []
            starts += linked
            paths = [os.path.join(folder, name) for name in sorted(names) if not name.startswith(".")]
            outside += [path for path in linked + paths if is_outside(path)]
            _check_format(folder, names)
            found += [SourceFile(os.path.relpath(path, root).replace(os.sep, "/"), path, os.stat(path).st_size) for path in paths]
    return _each_once(sorted(found, key=lambda f: os.fsencode(f.name)))


def _each_once(files: list[SourceFile]) -> list[SourceFile]:
    """Leave out links to files that are read under another name. Of several links to one file, the first is kept."""
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


def _check_format(folder: str, names: Sequence[str]) -> None:
    """Raise DataError if a folder holds a dataset that is not text. Otherwise only the JSON files that describe the dataset would
    be read."""
    for files, beside, what, way in DATASETS:
        data = [name for name in names if fnmatch(name, files)]
        if data and any(fnmatch(name, beside) for name in names):
            raise DataError(f"{folder} is {what} ({min(data)}), which mpidp cannot read. Convert it to text first: "
                            f"{way.format(folder=folder)}")


def _remarks(root: Path, links: list[str]) -> list[str]:
    if not links:
        return []
    shown = ", ".join(f"{path} -> {os.path.realpath(path)}" for path in links[:MAX_SHOWN])
    return [f"{len(links):,} links lead out of {root} and were followed: {shown}{', ...' if links[MAX_SHOWN:] else ''}"]

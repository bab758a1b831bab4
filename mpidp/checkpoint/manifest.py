"""Checkpoints on disk. A checkpoint is a folder with one file per rank that writes, and a manifest with checksums. The manifest
is written last. Then the folder gets its final name, which commits the checkpoint.

    RUN/checkpoints/step_00000100/rank_00000.safetensors ...   named boxes of global tensors, one file per rank
                                 /manifest.json                 sizes and crc32 of files, the position of each box
    RUN/latest                                                  the name of the newest committed checkpoint

A box is a range of indices in each dimension of a *global* tensor, so a checkpoint can be loaded on any number of ranks. A
checkpoint is valid if its folder has its final name, the crc32 of the manifest is correct, and the files have the sizes and
the crc32 that the manifest lists.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Required, TypedDict

import safetensors
from mpi4py import MPI

from mpidp.errors import CheckpointError
from mpidp.runtime.files import open_regular, sync_directory, write_file
from mpidp.runtime.json_file import check_type, parse_json
from mpidp.runtime.world import raise_together

FORMAT = 2
_HEADER = re.compile(r'\{"crc32": (\d{1,10}), "body":\n')
_STEP_DIR = re.compile(r"(?:\.replaced_)?step_(\d{8,})")


class _File(TypedDict):
    file: str
    bytes: int
    crc32: int
    pieces: dict[str, list[list[int]]]  # the box of each piece


class _Tensor(TypedDict):
    shape: list[int]
    dtype: str
    layout: str


class Manifest(TypedDict, total=False):
    """The entries of a manifest that readers use. A manifest has further entries, which describe the state of the run."""

    files: Required[list[_File]]
    tensors: Required[dict[str, _Tensor]]
    step: int
    config: dict[str, int | float | str | bool]
    fingerprint: dict[str, Any]
    shape: dict[str, Any]
    data: str
    tokenizer: str
    eod: int
    end: dict[str, Any] | None


def commit(temporary: Path, body: Mapping[str, Any], keep: int) -> Path:
    """Write the manifest into the folder `temporary`, rename the folder to step_XXXXXXXX, and return the new path. Then delete
    old checkpoints (see _prune).

    `body`: the content of the manifest. Raises OSError if a file that the manifest lists is missing or incomplete, or if the
    rename fails. Errors after the rename are ignored. Independent.
    """
    for record in body["files"]:
        with open(temporary / record["file"], "rb") as file:  # when a file is opened, a file server reports its current size
            if os.fstat(file.fileno()).st_size != record["bytes"]:
                raise OSError(f"{temporary / record['file']}: size differs from the {record['bytes']} bytes that were written")
    write_file(temporary / "manifest.json", _seal({"format": FORMAT, **body}))
    folder, final = temporary.parent, temporary.with_name(f"step_{body['step']:08d}")
    replaced = folder / f".replaced_{final.name}"
    if final.exists():  # an invalid checkpoint, or an earlier checkpoint of the same step
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(temporary, final)
    with suppress(OSError):
        sync_directory(folder)
        shutil.rmtree(replaced, ignore_errors=True)
        write_file(folder.parent / "latest", final.name.encode())
        _prune(folder, body["step"], keep)
    return final


def _crc32(file: IO[bytes]) -> int:
    crc = 0
    while block := file.read(1 << 22):
        crc = zlib.crc32(block, crc)
    return crc


def _seal(body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, indent=1)
    return f'{{"crc32": {zlib.crc32(text.encode())}, "body":\n{text}}}\n'.encode()


def _prune(folder: Path, step: int, keep: int) -> None:
    """Of the checkpoints up to `step`, delete all but the newest `keep`. Checkpoints of later steps are neither deleted nor
    counted, because the run resumed from an earlier one, so they are invalid. Also delete the unfinished folders of killed jobs.
    Each folder is renamed before it is deleted. A folder with a final name is therefore always complete."""
    for path in [*folder.glob(".old_*"), *folder.glob(".writing_*")]:  # left behind by killed jobs
        shutil.rmtree(path, ignore_errors=True)
    for path in [path for path in committed(folder) if step_of(path) <= step][keep:]:
        old = folder / f".old_{path.name}"
        os.rename(path, old)
        shutil.rmtree(old, ignore_errors=True)


def committed(folder: Path) -> list[Path]:
    """Return the checkpoint folders with final names, newest first. The checkpoints may be invalid. Independent.

    If a checkpoint is being replaced, its old folder is also in the list, after its new folder.
    """
    found = [p for p in folder.iterdir() if _STEP_DIR.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: (step_of(p), not p.name.startswith(".")), reverse=True)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint folder with a final name. Pure."""
    return int(path.name.rpartition("_")[2])


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the content of the manifest in the checkpoint folder `path`. Raises CheckpointError if the manifest is missing,
    incomplete or modified. Independent."""
    file = path / "manifest.json"
    try:
        with open_regular(file) as opened:
            text = opened.read().decode()
        header = _HEADER.match(text)
        if header is None:
            raise ValueError("it does not begin with its crc32")
        content = text[header.end() : text.rindex("}")]
        if zlib.crc32(content.encode()) != int(header[1]):
            raise CheckpointError(f"{file}: wrong crc32, the file was modified")
        body: dict[str, Any] = parse_json(content, dict)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
    if body.get("format") != FORMAT:
        raise CheckpointError(f"{path}: it has checkpoint format {body.get('format')}, but this version of mpidp reads format "
                              f"{FORMAT}")
    with readable(path):
        check_type(body, Manifest)
    return body


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Return a context that converts errors from reading a checkpoint to CheckpointError. Reading can fail even if all
    checksums are correct, because another program may have written the file. Independent."""
    try:
        yield
    except (OSError, TypeError, ValueError, LookupError, AttributeError, RuntimeError, safetensors.SafetensorError) as error:
        text = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: the checksums are correct, but this is not a checkpoint of this version of mpidp "
                              f"({text})") from error


def check_file(path: Path, record: Mapping[str, Any]) -> None:
    """Check the size and the crc32 of one file in the checkpoint folder `path`. `record`: the manifest's entry for this file.
    Raises CheckpointError if one of them is wrong. Independent."""
    file = path / record["file"]
    if file.parent != path:
        raise CheckpointError(f"{path / 'manifest.json'} lists {record['file']}, which is not in the same folder")
    try:
        with open_regular(file) as handle:
            if (size := os.fstat(handle.fileno()).st_size) != record["bytes"]:
                raise CheckpointError(f"{file}: it has {size} bytes, but the manifest states {record['bytes']}")
            crc = _crc32(handle)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
    if crc != record["crc32"]:
        raise CheckpointError(f"{file}: wrong crc32, the file is corrupted")


def newest_valid(run_dir: Path, comm: MPI.Intracomm) -> tuple[Path | None, list[str]]:
    """Return (checkpoint, reasons). checkpoint: the folder of the newest valid checkpoint, or None if there are no checkpoints.
    reasons: why each newer checkpoint was skipped. Each rank checks some of the files. Raises CheckpointError if there are
    checkpoints but none is valid. Collective over comm."""
    names = comm.bcast([p.name for p in committed(run_dir / "checkpoints")] if comm.rank == 0 else None, root=0)
    reasons: list[str] = []
    for name in names:
        path = run_dir / "checkpoints" / name
        try:
            with raise_together(comm), readable(path):
                for record in read_manifest(path)["files"][comm.rank :: comm.size]:
                    check_file(path, record)
            return path, reasons
        except CheckpointError as error:
            reasons.append(str(error))
    if not names:
        return None, []
    raise CheckpointError.on_every_rank(
        f"no checkpoint in {run_dir / 'checkpoints'} is valid ({'; '.join(reasons)}). Restore one from a backup, or start "
        "a new run with --run.resume=never"
    )

"""Checkpoints on disk: one file a writer, a checksummed manifest that is written last, and a rename that commits.

    RUN/checkpoints/step_00000100/rank_00000.safetensors ...   named boxes of global tensors, no pickle; by whom (saver.py)
                                 /manifest.json                 written last: sizes, crc32, which box lies where
    RUN/latest                                                  the name of the newest committed checkpoint

Pieces are boxes of *global* tensors, so what N ranks wrote loads onto any other number. A directory counts only
under its final name, with a manifest whose own crc32 is right and files whose sizes and crc32 are the manifest's.
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
from typing import IO, Any

import safetensors
from mpi4py import MPI

from mpidp.errors import CheckpointError
from mpidp.runtime.files import sync_directory, write_file
from mpidp.runtime.world import raise_together

FORMAT = 2
_STEP_DIR = re.compile(r"(?:\.replaced_)?step_(\d{8,})")


def commit(temporary: Path, body: Mapping[str, Any], keep: int) -> Path:
    """RUN/checkpoints/`temporary`, with all the files that body["files"] tells of, becomes step_XXXXXXXX; then all but the newest
    `keep` are forgotten. OSError when it could not; after the rename nothing matters that much. Independent."""
    for record in body["files"]:
        with open(temporary / record["file"], "rb") as file:  # opened, since a server is asked anew then
            if os.fstat(file.fileno()).st_size != record["bytes"]:
                raise OSError(f"{temporary / record['file']}: not of the {record['bytes']} bytes that were written")
    write_file(temporary / "manifest.json", _seal({"format": FORMAT, **body}))
    folder, final = temporary.parent, temporary.with_name(f"step_{body['step']:08d}")
    replaced = folder / f".replaced_{final.name}"
    if final.exists():  # an invalid one that was passed over, or the same step without its end record
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(temporary, final)
    with suppress(OSError):
        sync_directory(folder)
        shutil.rmtree(replaced, ignore_errors=True)
        write_file(folder.parent / "latest", final.name.encode())
        _prune(folder, keep)
    return final


def _crc32(file: IO[bytes]) -> int:
    crc = 0
    while block := file.read(1 << 22):
        crc = zlib.crc32(block, crc)
    return crc


def _seal(body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, indent=1)
    return f'{{"crc32": {zlib.crc32(text.encode())}, "body":\n{text}}}\n'.encode()


def _prune(folder: Path, keep: int) -> None:
    """The newest `keep` stay. A directory is renamed before it is emptied, so none is ever half there."""
    for path in [*folder.glob(".old_*"), *folder.glob(".writing_*")]:  # of jobs that were killed here
        shutil.rmtree(path, ignore_errors=True)
    for path in committed(folder)[keep:]:
        doomed = folder / f".old_{path.name}"
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def committed(folder: Path) -> list[Path]:
    """Directories under their final names, newest first; valid or not. Independent.

    One that was to be replaced counts until its successor has the final name.
    """
    found = [p for p in folder.iterdir() if _STEP_DIR.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: (int(p.name.rpartition("_")[2]), not p.name.startswith(".")), reverse=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest's body. CheckpointError when it is absent, cut short or altered. Independent."""
    try:
        text = (path / "manifest.json").read_text()
        crc = json.loads(text)["crc32"]
        begin = text.index("\n") + 1
        content = text[begin : text.rindex("}")]
        if zlib.crc32(content.encode()) != crc:
            raise CheckpointError(f"{path / 'manifest.json'}: its crc32 is wrong, it was altered")
        body: dict[str, Any] = json.loads(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'manifest.json'}: cannot be read ({error})") from error
    if body.get("format") != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {body.get('format')}, this mpidp reads format {FORMAT}")
    return body


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What a checkpoint says is used inside. CheckpointError where that is something else than this mpidp writes: checksums speak
    of accidents, not of whoever made the file. Independent."""
    try:
        yield
    except (OSError, TypeError, ValueError, LookupError, AttributeError, RuntimeError, safetensors.SafetensorError) as error:
        words = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: its checksums are right, but it is no checkpoint of this mpidp ({words})") from error


def check_file(path: Path, record: Mapping[str, Any]) -> None:
    """Size and crc32 of one file of a checkpoint. CheckpointError. Independent."""
    file = path / record["file"]
    if file.parent != path:
        raise CheckpointError(f"{path / 'manifest.json'}: {record['file']} is not a file beside it")
    try:
        if file.stat().st_size != record["bytes"]:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, the manifest says {record['bytes']}")
        with open(file, "rb") as handle:
            crc = _crc32(handle)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
    if crc != record["crc32"]:
        raise CheckpointError(f"{file}: its crc32 is wrong, a bit was flipped")


def newest_valid(run_dir: Path, comm: MPI.Intracomm) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes every check, and why newer ones were passed over. The files are checked by all
    ranks, each its share. (None, []) when there is none at all. CheckpointError when none of those there is valid.
    Collective over comm."""
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
        f"no checkpoint in {run_dir / 'checkpoints'} is valid: {'; '.join(reasons)}. Bring one back from a copy, or start "
        "anew with --run.resume=never"
    )

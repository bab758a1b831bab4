"""Checkpoints on disk: one file a writer, a checksummed manifest that is written last, and a rename that commits.

    RUN/checkpoints/step_00000100/rank_00000.safetensors ...   named boxes of global tensors, no pickle; by whom (saver.py)
                                 /manifest.json                 written last: sizes, crc32, which box lies where
    RUN/latest                                                  the name of the newest committed checkpoint

Pieces are boxes of *global* tensors, so what N ranks wrote loads onto any other number. A directory counts only
under its final name, with a manifest whose own crc32 is right and files whose sizes and crc32 are the manifest's.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.boxes import Box, tensor_of
from mpidp.comm.mesh import together
from mpidp.errors import CheckpointError
from mpidp.files import sync_directory, write_file
from mpidp.state import Entry

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
            with together(comm), readable(path):
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


class Reader(Mapping[str, Tensor]):
    """The global tensors of a checkpoint by name, assembled from their pieces when asked for. Independent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta = read_manifest(path)
        self._pieces: dict[str, list[tuple[str, str, Box]]] = {}  # of a tensor: in which file, by which name there, which box
        with readable(path):
            self._pieces |= {name: [] for name in self.meta["tensors"]}
            self._bytes = sum(int(record["bytes"]) for record in self.meta["files"])
            for record in self.meta["files"]:
                for key, box in record["pieces"].items():
                    self._pieces[tensor_of(key)].append((record["file"], key, box))

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor; of an additive one, the sum of its parts in rank order. CheckpointError when a part is missing."""
        return self.part(name)

    def part(self, name: str, at: Sequence[int] = (), shape: Sequence[int] | None = None) -> Tensor:
        """The box from `at` on, of this shape; the whole when it is left out. Only what lies in it is read. CheckpointError when
        something of it is missing."""
        with readable(self.path):
            whole = tuple(self.meta["tensors"][name]["shape"])
            return self._assembled(name, self._pieces[name], tuple(at) or (0,) * len(whole), whole if shape is None else shape)

    def box(self, name: str, entry: Entry) -> Tensor:
        """What this entry holds of the tensor. CheckpointError when the tensor is of another shape, or something is missing."""
        with readable(self.path):
            there, shape = tuple(self.meta["tensors"][name]["shape"]), entry.tensor.shape if entry.shape is None else entry.shape
            if there != tuple(shape):
                raise CheckpointError(f"{self.path}: {name} has shape {there}, this model's has {tuple(shape)}")
        return self.part(name, entry.place, entry.tensor.shape) if entry.tensor.numel() else torch.empty_like(entry.tensor)

    def _assembled(self, name: str, pieces: Iterable[tuple[str, str, Box]], at: Sequence[int], shape: Sequence[int]) -> Tensor:
        about = self.meta["tensors"][name]
        dtype = getattr(torch, about["dtype"])
        if not 0 <= math.prod(about["shape"]) * dtype.itemsize <= self._bytes:
            raise ValueError(f"{name} of shape {about['shape']} in {self._bytes} bytes")
        found = torch.zeros(tuple(shape), dtype=dtype)
        filled = 0
        for file, key, box in pieces:
            if any(not 0 <= start <= stop <= length for (start, stop), length in zip(box, about["shape"], strict=True)):
                raise ValueError(f"{name} of shape {about['shape']} from {box}")
            ranges = [
                (max(start, a), min(stop, a + length)) for (start, stop), a, length in zip(box, at, shape, strict=True)
            ]
            if any(low >= high for low, high in ranges) and found.numel():
                continue
            with safetensors.safe_open(self.path / file, "pt") as opened:
                if box == [list(one) for one in ranges]:
                    piece = opened.get_tensor(key)
                else:
                    inside = [slice(low - start, high - start) for (low, high), (start, _) in zip(ranges, box, strict=True)]
                    piece = opened.get_slice(key)[tuple(inside)]
            place = found[tuple(slice(low - a, high - a) for (low, high), a in zip(ranges, at, strict=True))]
            if about["layout"] == "additive":
                place += piece
            else:
                place.copy_(piece)
            filled += piece.numel()
        if about["layout"] != "additive" and filled != found.numel():
            raise CheckpointError(f"{self.path}: {name} has {filled} of {found.numel()} elements")
        return found

    def under(
        self, prefix: str, rank: int = 0, size: int = 1, boxes: Mapping[str, Mapping[str, Entry]] | None = None
    ) -> dict[str, Tensor]:
        """All tensors whose names begin with prefix, without it; of an additive one, what this rank of `size` goes on with.
        boxes: by tensor, those that this rank holds of it, which alone are then read, and given by the boxes' names."""
        found = {}
        for name in (name for name in self if name.startswith(prefix)):
            held = (boxes or {}).get(name.removeprefix(prefix))
            if held is None:
                found[name.removeprefix(prefix)] = self.own(name, rank, size)
            else:
                found |= {key: self.box(name, entry) for key, entry in held.items()}
        return found

    def own(self, name: str, rank: int, size: int) -> Tensor:
        """The whole tensor; of an additive one, what this rank of `size` goes on with."""
        pieces, about = self._pieces[name], self.meta["tensors"][name]
        if about["layout"] == "additive":  # written by as many: to each its own; else the sum to rank 0
            pieces = pieces[rank : rank + 1] if len(pieces) == size else pieces if rank == 0 else []
        with readable(self.path):
            return self._assembled(name, pieces, (0,) * len(about["shape"]), about["shape"])

"""Checkpoints on disk: one file a writer, a checksummed manifest that is written last, and a rename that commits.

    RUN/checkpoints/step_00000100/rank_00000.safetensors ...   named pieces of global tensors, no pickle; by whom (saver.py)
                                 /manifest.json                 written last: sizes, crc32, which index range lies where
    RUN/latest                                                  the name of the newest committed checkpoint

Pieces are index ranges of *global* tensors, so what N ranks wrote loads onto any other number. A directory counts only
under its final name, with a manifest whose own crc32 is right and files whose sizes and crc32 are the manifest's.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.mesh import together
from mpidp.errors import CheckpointError
from mpidp.files import sync_directory, write_file
from mpidp.state import Entry

FORMAT = 1
SYNC_BYTES = 64 << 20  # go to the disk before more is written, so that a long file comes further all the time
DTYPES = {  # as safetensors calls them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}
_STEP_DIR = re.compile(r"(?:\.replaced_)?step_(\d{8,})")


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows along dim 0, elements a row); a scalar is one row."""
    rows = shape[0] if shape else 1
    elements = 1
    for length in shape[1:]:
        elements *= length
    return rows, elements


def share_out(shapes: Mapping[str, tuple[int, ...]], rank: int, size: int) -> dict[str, tuple[int, int]]:
    """Which rows [start, stop) of each replicated tensor writer `rank` of `size` writes: about 1/size of all elements, each row
    once. Pure."""
    total = sum(rows * elements for rows, elements in map(_rows, shapes.values()))
    low, high = rank * total // size, (rank + 1) * total // size
    mine, offset = {}, 0
    for name in sorted(shapes):
        rows, elements = _rows(shapes[name])
        start, stop = (min(rows, max(0, -(-(edge - offset) // max(1, elements)))) for edge in (low, high))
        if start < stop:
            mine[name] = (start, stop)
        offset += rows * elements
    return mine


@dataclass(frozen=True)
class Piece:
    """An index range along `dim` of a global tensor, [start, start + its length): what one rank writes of it."""

    name: str
    tensor: Tensor
    dim: int
    start: int

    @property
    def range(self) -> list[int]:
        """[dim, start, stop], as a manifest has it."""
        return [self.dim, self.start, self.start + (self.tensor.shape[self.dim] if self.tensor.dim() else 1)]


def pieces_of(entries: Mapping[str, Entry], share: tuple[int, int] | None) -> list[Piece]:
    """What this rank writes, in the order of its file: part share[0] of share[1] of what all ranks hold (None: nothing of that),
    and whatever it alone holds. Independent."""
    found = []
    replicated = {name: tuple(e.tensor.shape) for name, e in entries.items() if e.layout == "replicated"}
    for name, (start, stop) in (share_out(replicated, *share) if share else {}).items():
        tensor = entries[name].tensor.detach()
        found.append(Piece(name, (tensor if tensor.dim() else tensor.view(1))[start:stop], 0, start))
    for name, entry in entries.items():
        if entry.layout != "replicated":
            found.append(Piece(name, entry.tensor.detach(), entry.dim, entry.start))
    return sorted(found, key=lambda piece: (-piece.tensor.element_size(), piece.name))  # each at a multiple of its element's size


def describe(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Entries as a manifest has them. Independent."""
    return {
        name: {
            "shape": list(e.shape if e.shape is not None else e.tensor.shape),
            "dtype": str(e.tensor.dtype).removeprefix("torch."), "layout": e.layout,
        }
        for name, e in entries.items()
    }


def write_pieces(path: Path, pieces: Sequence[Piece], blocks: Iterable[memoryview]) -> tuple[int, int]:
    """A safetensors file of pieces whose bytes, in their order, are the blocks: (bytes, crc32 of it), once it is on the disk.
    The interpreter is free for other threads meanwhile. OSError names the file, and nothing is left of it. Independent."""
    about: dict[str, Any] = {}
    offset = 0
    for piece in pieces:
        dtype, end = DTYPES[piece.tensor.dtype], offset + piece.tensor.nbytes
        about[piece.name] = {"dtype": dtype, "shape": list(piece.tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(about).encode()
    text += b" " * (-len(text) % 8)
    size = crc = 0
    try:
        with open(path, "wb", buffering=0) as file:
            for block in itertools.chain([memoryview(len(text).to_bytes(8, "little") + text)], blocks):
                length = len(block)
                size, crc = size + length, zlib.crc32(block, crc)
                while len(block):
                    block = block[file.write(block) :]
                if size // SYNC_BYTES > (size - length) // SYNC_BYTES:
                    os.fdatasync(file.fileno())
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            path.unlink()  # others may need the room
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    return size, crc


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
        self._pieces: dict[str, list[tuple[str, int, int, int]]] = {}
        with readable(path):
            self._pieces |= {name: [] for name in self.meta["tensors"]}
            self._bytes = sum(int(record["bytes"]) for record in self.meta["files"])
            for record in self.meta["files"]:
                for name, (dim, start, stop) in record["pieces"].items():
                    self._pieces[name].append((record["file"], dim, start, stop))

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor; of an additive one, the sum of its parts in rank order. CheckpointError when a part is missing."""
        with readable(self.path):
            return self._assembled(name, self._pieces[name])

    def _assembled(self, name: str, pieces: Iterable[tuple[str, int, int, int]]) -> Tensor:
        about = self.meta["tensors"][name]
        shape, dtype = tuple(about["shape"]), getattr(torch, about["dtype"])
        if not 0 <= math.prod(shape) * dtype.itemsize <= self._bytes:
            raise ValueError(f"{name} of shape {list(shape)} in {self._bytes} bytes")
        whole = torch.zeros(shape or (1,), dtype=dtype)
        filled = 0
        for file, dim, start, stop in pieces:
            with safetensors.safe_open(self.path / file, "pt") as opened:
                piece = opened.get_tensor(name)
            if about["layout"] == "additive":
                whole += piece
            else:
                whole.narrow(dim, start, stop - start).copy_(piece)
            filled += piece.numel()
        if about["layout"] != "additive" and filled != whole.numel():
            raise CheckpointError(f"{self.path}: {name} has {filled} of {whole.numel()} elements")
        return whole.view(shape)

    def under(self, prefix: str, rank: int = 0, size: int = 1) -> dict[str, Tensor]:
        """All tensors whose names begin with prefix, without it; of an additive one, what this rank of `size` goes on with."""
        return {name.removeprefix(prefix): self._part(name, rank, size) for name in self if name.startswith(prefix)}

    def _part(self, name: str, rank: int, size: int) -> Tensor:
        pieces, additive = self._pieces[name], self.meta["tensors"][name]["layout"] == "additive"
        if additive:  # written by as many: to each its own; else the sum to rank 0
            pieces = pieces[rank : rank + 1] if len(pieces) == size else pieces if rank == 0 else []
        return self._assembled(name, pieces)

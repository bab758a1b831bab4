"""Checkpoints: every rank writes its slice, a checksummed manifest is written last, and a rename commits.

    RUN/checkpoints/step_00000100/rank_00000.safetensors ...   named pieces of global tensors, no pickle
                                 /manifest.json                 written last: sizes, crc32, which index range lies where
    RUN/latest                                                  the name of the newest committed checkpoint

Pieces are index ranges of *global* tensors, so what N ranks wrote loads onto any other number. A directory counts only
under its final name, with a manifest whose own crc32 is right and files whose sizes and crc32 are the manifest's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.mesh import together
from mpidp.errors import CheckpointError, MpidpError
from mpidp.files import sync_directory, write_file
from mpidp.state import Entry

FORMAT = 1
_STEP_DIR = re.compile(r"(?:\.replaced_)?step_(\d{8,})")


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows along dim 0, elements a row); a scalar is one row."""
    rows = shape[0] if shape else 1
    elements = 1
    for length in shape[1:]:
        elements *= length
    return rows, elements


def share_out(shapes: Mapping[str, tuple[int, ...]], rank: int, size: int) -> dict[str, tuple[int, int]]:
    """Which rows [start, stop) of each replicated tensor this rank writes: about 1/size of all elements, each row once. Pure."""
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


def _slices(entries: Mapping[str, Entry], comm: MPI.Intracomm) -> dict[str, tuple[Tensor, int, int]]:
    """This rank's pieces: name -> (tensor, dim, start)."""
    replicated = {name: tuple(e.tensor.shape) for name, e in entries.items() if e.layout == "replicated"}
    pieces = {}
    for name, (start, stop) in share_out(replicated, comm.rank, comm.size).items():
        tensor = entries[name].tensor.detach()
        pieces[name] = ((tensor if tensor.dim() else tensor.view(1))[start:stop], 0, start)
    for name, entry in entries.items():
        if entry.layout != "replicated":
            pieces[name] = (entry.tensor.detach(), entry.dim, entry.start)
    return pieces


def save(
    run_dir: Path, step: int, entries: Mapping[str, Entry], meta: Mapping[str, Any], comm: MPI.Intracomm, keep: int
) -> Path:
    """Write and commit checkpoints/step_XXXXXXXX; then forget all but the newest `keep`. Collective over comm."""
    folder = run_dir / "checkpoints"
    final = folder / f"step_{step:08d}"
    temporary = folder / f".writing_step_{step:08d}"
    with together(comm), _plain_words(run_dir):
        if comm.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    record: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    with together(comm), _plain_words(run_dir):
        pieces = _slices(entries, comm)
        name = f"rank_{comm.rank:05d}.safetensors"
        size, crc = _write_tensors(temporary / name, {name: t.cpu().contiguous() for name, (t, _, _) in pieces.items()})
        ranges = {n: [dim, start, start + (t.shape[dim] if t.dim() else 1)] for n, (t, dim, start) in pieces.items()}
        record = {"file": name, "bytes": size, "crc32": crc, "pieces": ranges}
        for n, e in entries.items():
            shape = list(e.shape if e.shape is not None else e.tensor.shape)
            tensors[n] = {"shape": shape, "dtype": str(e.tensor.dtype).removeprefix("torch."), "layout": e.layout}
    records = comm.gather(record, root=0)
    described = comm.gather(tensors, root=0)
    with together(comm), _plain_words(run_dir):
        if comm.rank == 0:
            assert records is not None and described is not None
            known = {name: about for part in described for name, about in part.items()}
            body = {"format": FORMAT, "step": step, **meta, "tensors": dict(sorted(known.items())), "files": records}
            write_file(temporary / "manifest.json", _seal(body))
            replaced = folder / f".replaced_{final.name}"
            if final.exists():  # an invalid one that was passed over, or the same step without its end record
                shutil.rmtree(replaced, ignore_errors=True)
                os.rename(final, replaced)
            os.rename(temporary, final)
            sync_directory(folder)
            shutil.rmtree(replaced, ignore_errors=True)
            write_file(run_dir / "latest", final.name.encode())
            _prune(folder, keep)
    return final


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[int, int]:
    """(bytes, crc32) of the file. Straight from the tensors' memory: a copy of a large model may not fit beside it."""
    try:
        safetensors.torch.save_file(tensors, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        return path.stat().st_size, _crc32(file)


def _crc32(file: IO[bytes]) -> int:
    crc = 0
    while block := file.read(1 << 22):
        crc = zlib.crc32(block, crc)
    return crc


@contextmanager
def _plain_words(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MpidpError(
            f"a checkpoint could not be written in {run_dir} ({error}). Make room there, or choose another --run.dir; the "
            "checkpoints before it are as they were, and the same command goes on from them"
        ) from error


def _seal(body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, indent=1)
    return f'{{"crc32": {zlib.crc32(text.encode())}, "body":\n{text}}}\n'.encode()


def _prune(folder: Path, keep: int) -> None:
    """The newest `keep` stay. A directory is renamed before it is emptied, so none is ever half there."""
    for path in folder.glob(".old_*"):  # of a job that was killed here
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


def check_file(path: Path, record: Mapping[str, Any]) -> None:
    """Size and crc32 of one file of a checkpoint. CheckpointError. Independent."""
    file = path / record["file"]
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
            with together(comm):
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
        self._pieces: dict[str, list[tuple[str, int, int, int]]] = {name: [] for name in self.meta["tensors"]}
        for record in self.meta["files"]:
            for name, (dim, start, stop) in record["pieces"].items():
                self._pieces[name].append((record["file"], dim, start, stop))

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor; of an additive one, the sum of its parts in rank order. CheckpointError when a part is missing."""
        about = self.meta["tensors"][name]
        shape = tuple(about["shape"])
        whole = torch.zeros(shape or (1,), dtype=getattr(torch, about["dtype"]))
        filled = 0
        for file, dim, start, stop in self._pieces[name]:
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

    def under(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose names begin with prefix, without it."""
        return {name.removeprefix(prefix): self[name] for name in self if name.startswith(prefix)}

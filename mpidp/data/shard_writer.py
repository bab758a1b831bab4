"""Write a shard, and compute the checksums of one. shards.py describes the format."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from mpidp.data.tokenizer import token_dtype
from mpidp.runtime.files import open_regular, write_file

SHARD_FORMAT = "mpidp-tokens"
VERSION = 1
PIECE_BYTES = 4 * 2**20  # bytes read and hashed at a time


def checksums(path: Path) -> tuple[str, str]:
    """Return (crc32, sha256) of a file, in hexadecimal. Independent."""
    crc32, sha256 = 0, hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(PIECE_BYTES):
            crc32 = zlib.crc32(piece, crc32)
            sha256.update(piece)
    return f"{crc32:08x}", sha256.hexdigest()


class Written(NamedTuple):
    """The size in bytes and the checksums of a written file, for the index."""

    size: int
    crc32: str
    sha256: str


def write_shard(
    path: Path, pieces: Iterable[np.ndarray], num_tokens: int, doc_offsets: np.ndarray,
    attributes: dict[str, int | str], mask: Iterable[np.ndarray] | None = None,
) -> Written:
    """Write one shard from pieces with num_tokens ids in total. Independent.

    attributes: at least split, vocab_size and tokenizer_sha256. The same input gives the same bytes. The file is written
    atomically: it gets its name when it is complete and on disk.
    """
    dtypes = {"tokens": token_dtype(int(attributes["vocab_size"])), "loss_mask": np.dtype("u1")}

    def write(temporary: Path) -> None:
        with _errors_of_the_system(), h5py.File(
            temporary, "w", libver=("earliest", "v110"), track_order=False, locking=False  # nobody else knows the file
        ) as file:
            file.create_dataset("doc_offsets", data=np.asarray(doc_offsets, dtype="<u8"))
            for name, source in (("tokens", pieces), ("loss_mask", mask)):
                if source is None:
                    continue
                dataset, at = file.create_dataset(name, shape=(num_tokens,), dtype=dtypes[name]), 0
                for piece in source:
                    dataset[at : at + len(piece)] = piece
                    at += len(piece)
                if at != num_tokens:
                    raise ValueError(f"{path}: expected {num_tokens} {name}, got {at}")
            for key, value in {"format": SHARD_FORMAT, "version": VERSION, **attributes}.items():
                file.attrs[key] = np.bytes_(value) if isinstance(value, str) else np.int64(value)

    write_file(path, write)
    crc32, sha256 = checksums(path)
    return Written(path.stat().st_size, crc32, sha256)


@contextmanager
def _errors_of_the_system() -> Iterator[None]:
    """Raise OSError where HDF5 raises RuntimeError, for example because the disk is full when it closes a file."""
    try:
        yield
    except RuntimeError as error:
        number = re.search(r"errno = (\d+)", str(error))
        raise OSError(int(number[1]) if number else 0, str(error)) from error

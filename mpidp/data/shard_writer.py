"""Writes a shard, and computes its checksums. shards.py describes the format."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from mpidp.data.checksums import checksums
from mpidp.data.tokenizer import token_dtype
from mpidp.runtime.files import write_file

SHARD_FORMAT = "mpidp-tokens"
VERSION = 1
HDF5_BYTES = 1 << 16  # upper limit of the number of bytes that HDF5 writes in addition to the data


class Written(NamedTuple):
    """The size of a written file in bytes, and its checksums."""

    size: int
    crc32: str
    sha256: str


def write_shard(
    path: Path, pieces: Iterable[np.ndarray], num_tokens: int, doc_offsets: np.ndarray,
    attributes: dict[str, int | str], mask: Iterable[np.ndarray] | None = None,
) -> Written:
    """Write one shard. `pieces`: arrays of ids, whose concatenation has `num_tokens` ids. `mask`: arrays of the loss mask with
    the same total length, or None. Independent.

    `doc_offsets`: the positions at which documents start. `attributes`: the shard's attributes, at least split, vocab_size and
    tokenizer_sha256. The same input gives the same bytes. The file gets its final name when it is complete and on disk.
    """
    dtypes = {"tokens": token_dtype(int(attributes["vocab_size"])), "loss_mask": np.dtype("u1")}

    ids = dtypes["tokens"].itemsize + (mask is not None)
    room = num_tokens * ids + 8 * len(doc_offsets) + HDF5_BYTES

    def write(temporary: Path) -> None:
        with open(temporary, "r+b") as empty:
            _reserve(empty.fileno(), room)  # before HDF5 opens the file, because HDF5 cannot close a file on a full disk
        with h5py.File(
            temporary, "w", libver=("earliest", "v110"), track_order=False, locking=False  # no other process opens this file
        ) as file, _closable(file):
            _reserve(file.id.get_vfd_handle(), room)  # again, because HDF5 has truncated the file
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
            file.flush()
            size = file.id.get_filesize()
        os.truncate(temporary, size)

    write_file(path, write)
    crc32, sha256 = checksums(path)
    return Written(path.stat().st_size, crc32, sha256)


def _reserve(handle: int, size: int) -> None:
    """Reserve `size` bytes on the disk for the open file `handle`. Raises OSError if the disk has less free space."""
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # not supported by this file system
            raise


@contextmanager
def _closable(file: h5py.File) -> Iterator[None]:
    """Return a context in which HDF5 writes `file`. If a write fails, the context redirects further writes to memory, so that
    HDF5 can close the file. It then raises OSError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        memory = os.memfd_create("lost")
        os.dup2(memory, file.id.get_vfd_handle())
        os.close(memory)
        number = re.search(r"errno = (\d+)", str(error))
        raise OSError(error.errno if isinstance(error, OSError) else int(number[1]) if number else 0, str(error)) from error

"""Decompresses a file of a dataset into a temporary file of a known size."""

from __future__ import annotations

import bz2
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mpidp.data.unpack import zstandard
from mpidp.errors import DataError
from mpidp.runtime.files import open_regular

PIECE_BYTES = 2**20
CODECS = ("zstd", "gz", "bz2")


@contextmanager
def expanded(path: Path, codec: str, size: int | None, scratch: Path) -> Iterator[Path]:
    """Return a context that yields the path of a temporary file with the decompressed bytes of `path`.

    `codec`: the name of the codec, perhaps with a level ("zstd:3"). `size`: the number of decompressed bytes, or None if unknown.
    `scratch`: the folder of the temporary file. Raises DataError if the codec is unknown, if the file is damaged, or if it does
    not decompress to `size` bytes. Never writes more than `size` bytes. Independent.
    """
    name = codec.partition(":")[0]
    if name not in CODECS:
        raise DataError(f"{path} is compressed with {codec!r}, which mpidp cannot read. Write the dataset again with "
                        f"{', '.join(CODECS)}, or without compression")
    target = scratch / "expanded"
    try:
        with open_regular(path) as packed, open(target, "wb") as file:
            written = 0
            for piece in _pieces(_opened(packed, name, path), path, name):
                written += len(piece)
                if size is not None and written > size:
                    break
                file.write(piece)
        if size is not None and written != size:
            raise DataError(f"{path}: it does not decompress to {size} bytes, the size in the index. Copy the dataset again")
        yield target
    except FileNotFoundError:
        raise DataError(f"{path} is missing: copy the whole dataset") from None
    finally:
        target.unlink(missing_ok=True)


def _opened(file: Any, name: str, path: Path) -> BinaryIO:
    if name == "zstd":
        return zstandard(path).ZstdDecompressor(max_window_size=2**31).stream_reader(file, read_across_frames=True)  # type: ignore[no-any-return]
    return gzip.GzipFile(fileobj=file) if name == "gz" else bz2.BZ2File(file)  # type: ignore[return-value]


def _pieces(stream: BinaryIO, path: Path, name: str) -> Iterator[bytes]:
    errors: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile, OSError)
    if name == "zstd":
        errors += (zstandard(path).ZstdError,)
    try:
        while piece := stream.read(PIECE_BYTES):
            yield piece
    except errors as error:
        raise DataError(f"{path}: damaged {name} data ({error}); copy the file again") from None

"""Access to shards in a local folder, or in a folder at an address such as s3://bucket/prefix (mpidp/storage).

LocalShards and RemoteShards have an attribute `local`. It is a local folder with the small files, such as index.json and
tokenizer.json. If the shards are at an address, this folder contains copies. The method open() of both classes returns an
object with the methods of Shard.
"""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol, TypeVar

import numpy as np

from mpidp.data.checksums import checksums, checksums_of
from mpidp.data.index import Index, read_index
from mpidp.errors import UsageError
from mpidp.storage.address import address_problems, is_remote
from mpidp.storage.ranges import HeaderReader, RemoteArray, RemoteFile, RemoteReader
from mpidp.storage.remote import DEFAULT_CACHE, CacheOptions, RemoteFolder
from mpidp.storage.store import Version

T = TypeVar("T")


class Slices(Protocol):
    """A vector in a file. Indexing it with a slice returns an array."""

    def __getitem__(self, places: slice, /) -> np.ndarray: ...


class Shard(Protocol):
    """A file in a folder of shards. Independent."""

    size: int
    is_regular: bool

    def read_header(self, work: Callable[[Any], T]) -> T:
        """Return work(x), where x is the object to pass to h5py.File. `work` may be called several times. Independent."""

    def view(self, dtype: np.dtype[Any], offset: int, count: int) -> Slices:
        """Return a vector of `count` elements that begins at byte `offset` of the file. Independent."""

    def advise(self, begin: int, size: int) -> None:
        """Start reading bytes [begin, begin + size) ahead of time, and return immediately. Independent."""

    def checksums(self) -> tuple[str, str]:
        """Return (crc32, sha256) of the file, in hexadecimal. Independent."""

    def is_whole(self) -> bool:
        """Return False if the file has become shorter since it was opened. Independent."""

    def forget(self) -> None:
        """Delete the cached parts of the file. Call this method if the file's checksum is wrong. Independent."""


class LocalShard:
    """A file on a local disk. The first call of view() maps it into memory. Raises OSError if the file is missing."""

    def __init__(self, path: Path) -> None:
        status = os.stat(path)
        self.size, self.is_regular = status.st_size, S_ISREG(status.st_mode)
        self._path = path
        self._map: mmap.mmap | None = None

    def read_header(self, work: Callable[[Any], T]) -> T:
        """Return work(path of the file). Independent."""
        return work(self._path)

    def view(self, dtype: np.dtype[Any], offset: int, count: int) -> np.ndarray:
        """Return a vector of `count` elements that begins at byte `offset`, without copying it. Independent."""
        return np.frombuffer(self._mapped(), dtype, count=count, offset=offset)

    def advise(self, begin: int, size: int) -> None:
        """Ask the kernel to read bytes [begin, begin + size) ahead of time. Independent."""
        page = begin - begin % mmap.PAGESIZE
        self._mapped().madvise(mmap.MADV_WILLNEED, page, begin + size - page)

    def checksums(self) -> tuple[str, str]:
        """Return (crc32, sha256) of the file, in hexadecimal. Independent."""
        return checksums(self._path)

    def forget(self) -> None:
        """Do nothing, because a local file has no cache. Independent."""

    def is_whole(self) -> bool:
        """Return False if the file has become shorter since it was opened. Independent."""
        return self._map is None or self._map.size() >= self.size  # size() asks for the size of the file, not of the map

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            with open(self._path, "rb") as raw:
                self._map = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map


class RemoteShard:
    """A file at an address. Its blocks are cached in a local folder (mpidp/storage/cache.py)."""

    is_regular = True

    def __init__(self, file: RemoteFile) -> None:
        self._file, self.size = file, file.size

    def read_header(self, work: Callable[[Any], T]) -> T:
        """Return work(file object). `work` is called again until all bytes that it reads have been fetched. Independent."""
        return HeaderReader(self._file).run(work)

    def view(self, dtype: np.dtype[Any], offset: int, count: int) -> RemoteArray:
        """Return a vector of `count` elements that begins at byte `offset`. A slice of the vector is read when it is used.
        Independent."""
        return RemoteArray(self._file, dtype, offset, count)

    def advise(self, begin: int, size: int) -> None:
        """Start fetching bytes [begin, begin + size), and return immediately. Independent."""
        self._file.advise(begin, size)

    def checksums(self) -> tuple[str, str]:
        """Return (crc32, sha256) of the file, in hexadecimal. Independent."""
        return checksums_of(io.BufferedReader(RemoteReader(self._file)))

    def is_whole(self) -> bool:
        """Return True. Independent."""
        return True

    def forget(self) -> None:
        """Delete the cached parts of the file. Independent."""
        self._file.forget()


class LocalShards:
    """A local folder of shards. `path`, `local`: the path of this folder."""

    def __init__(self, folder: Path) -> None:
        self.path = self.local = folder
        self.versions: Mapping[str, Version] = {}  # see RemoteFolder

    def open(self, name: str) -> LocalShard:
        """Open a shard. Raises OSError if the shard is missing. Independent."""
        return LocalShard(self.path / name)

    def expect(self, versions: Mapping[str, Version]) -> None:
        """Do nothing. Only RemoteFolder compares versions of files. Independent."""

    def check_room(self, size: int) -> None:
        """Do nothing. Only RemoteFolder has a cache. Independent."""

    def report_waits(self, on_wait: Callable[[], None]) -> None:
        """Do nothing. Only RemoteFolder waits for a server. Independent."""


class RemoteShards(RemoteFolder):
    """A folder of shards at an address. RemoteFolder describes the arguments."""

    def open(self, name: str) -> RemoteShard:
        """Open a shard. Raises FileNotFoundError if the shard is missing, and DataError if the server fails. Independent."""
        return RemoteShard(self.open_file(name))


def open_folder(path: str | Path, cache: CacheOptions = DEFAULT_CACHE) -> LocalShards | RemoteShards:
    """Open a folder of shards. Raises UsageError if an address is not valid, and DataError if the server fails. Independent."""
    if isinstance(path, str) and is_remote(path):
        return RemoteShards(path, cache)
    for problem in address_problems("", str(path)):
        raise UsageError(problem)
    return LocalShards(Path(path))


def open_index(path: str) -> Index:
    """Return the index of a folder of shards. Raises the same errors as open_folder() and read_index(). Independent."""
    return read_index(open_folder(path).local, shown=path)

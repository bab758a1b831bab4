"""The interface of all stores. A store has files with a size and a version, which are read in ranges of bytes.

The version, for example an S3 ETag, changes when a file is replaced. read() returns bytes of the stated version, or raises
Changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, NamedTuple, Protocol

from mpidp.storage.address import Address


class Version(NamedTuple):
    """The size of a file in bytes, and a text that changes when the file is replaced."""

    size: int
    tag: str


class Unreachable(Exception):  # noqa: N818
    """The server did not answer, or answered with a temporary error. The request can be tried again."""


class Refused(Exception):  # noqa: N818
    """The server answered with a permanent error, for example that the bucket does not exist."""


class Missing(Refused):
    """The file does not exist."""


class Changed(Refused):
    """The file no longer has the requested version."""


class Store(Protocol):
    """A folder on a server. Every method makes one request. If the request fails, it raises Unreachable or Refused. Thread-safe.
    Independent."""

    address: Address

    def version(self, name: str) -> Version:
        """Return the size and the version of a file. Raises Missing if the file does not exist. Independent."""

    def read(self, name: str, start: int, stop: int, version: Version) -> bytes:
        """Return bytes [start, stop) of this version of a file. Raises Changed if the file has another version. Independent."""

    def write(self, name: str, content: IO[bytes], size: int) -> None:
        """Write a file of `size` bytes, and replace an existing file. If writing fails, the file does not exist or has a wrong
        size. Independent."""

    def names(self, folder: str) -> list[str]:
        """Return the names of all files below a folder, relative to the store. Independent."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete files. Independent."""


def checked_length(data: bytes, start: int, stop: int) -> bytes:
    """Return the data if its length is that of the range. Raises Unreachable if the answer was cut off. Pure."""
    if len(data) != stop - start:
        raise Unreachable(f"{len(data):,} of {stop - start:,} bytes arrived")
    return data

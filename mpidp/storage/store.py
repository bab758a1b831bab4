"""The interface of all stores: files with a size and a version, which are read in ranges of bytes.

A version changes when a file is replaced: an S3 ETag, for example. read() returns bytes of the stated version, or raises Changed.
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
    """The server did not answer, or answered with an error that may pass. The request can be tried again."""


class Refused(Exception):  # noqa: N818
    """The server answered with an error that does not pass: no access, no such bucket."""


class Missing(Refused):
    """There is no such file."""


class Changed(Refused):
    """The file is no longer of the version that was asked for."""


class Store(Protocol):
    """A folder on a server. Every method makes one request, and raises Unreachable or Refused. Thread-safe. Independent."""

    address: Address

    def version(self, name: str) -> Version:
        """Return the size and the version of a file. Raises Missing if there is none. Independent."""

    def read(self, name: str, start: int, stop: int, version: Version) -> bytes:
        """Return bytes [start, stop) of a file of this version. Raises Changed if it has another version. Independent."""

    def write(self, name: str, content: IO[bytes], size: int) -> None:
        """Write a file of `size` bytes, and replace an earlier file. A file that is not complete has no name, or a wrong size.
        Independent."""

    def names(self, folder: str) -> list[str]:
        """Return the names of all files below a folder, relative to the store. Independent."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete files. Independent."""


def checked_length(data: bytes, start: int, stop: int) -> bytes:
    """Return the data if they have the length of the range. Raises Unreachable if the answer was cut off. Pure."""
    if len(data) != stop - start:
        raise Unreachable(f"{len(data):,} of {stop - start:,} bytes arrived")
    return data

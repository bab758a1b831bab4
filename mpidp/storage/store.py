"""The interface of all stores. A store is a folder on a server. The files of the folder are read in ranges of bytes.

A file has a version, for example an S3 ETag, which changes when the file is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, NamedTuple, Protocol

from mpidp.storage.address import Address


class Version(NamedTuple):
    """The version of a file. `size`: the size of the file in bytes. `tag`: a text that changes when the file is replaced."""

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
    """A folder on a server. A method raises Unreachable or Refused if its request fails. It does not repeat the request.
    Thread-safe. Independent."""

    address: Address

    def version(self, name: str) -> Version:
        """Return the size and the version of a file. Raises Missing if the file does not exist. Independent."""

    def read(self, name: str, start: int, stop: int, version: Version) -> bytes:
        """Return bytes [start, stop) of a file. Raises Changed if the file no longer has the version `version`.
        Independent."""

    def write(self, name: str, content: IO[bytes], size: int) -> None:
        """Write `size` bytes of `content` to the file `name`. An existing file is replaced. After an error, the file may be
        missing or have a wrong size. Independent."""

    def names(self, folder: str) -> list[str]:
        """Return the names of all files in `folder` and its subfolders. A name includes the path from the store's folder.
        Independent."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete the files with these names. Independent."""


def checked_length(data: bytes, start: int, stop: int) -> bytes:
    """Return `data` if it has the length of the range [start, stop). Raises Unreachable for other lengths, because the answer was
    cut off. Pure."""
    if len(data) != stop - start:
        raise Unreachable(f"{len(data):,} of {stop - start:,} bytes arrived")
    return data

"""Folders that the package fsspec opens, for example in Google or Azure storage. fsspec's packages are imported when they are
first needed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import IO, Any

from mpidp.errors import DataError, UsageError
from mpidp.storage.address import Address, credentials_from, named, without_secrets
from mpidp.storage.store import Changed, Missing, Refused, Unreachable, Version, checked_length

PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
PIECE = 8 << 20  # number of bytes that are written at a time


def open_filesystem(address: Address, name: str, **options: Any) -> tuple[Any, str]:
    """Return fsspec's filesystem, and the path of the folder in this filesystem. `name`: the name of the setting that contains
    the address, for error messages. `options`: passed to fsspec. Raises UsageError if the protocol is unknown or needs a
    package that is missing. Raises DataError if the address cannot be opened. Independent."""
    if address.protocol in PACKAGES:  # gcsfs logs the traceback of each error that it raises
        logging.getLogger(PACKAGES[address.protocol]).addHandler(logging.NullHandler())
    try:
        import fsspec

        return fsspec.core.url_to_fs(address, use_listings_cache=False, **options)
    except ImportError:
        extra = "'mpidp[remote]'"
        package = PACKAGES.get(address.protocol, extra)
        needs = f"pip install {package}" if address.protocol not in PACKAGES else f"pip install {extra} {package}"
        raise UsageError(
            f"{named(name, address)}: {address.protocol}:// needs a package that is not installed. Install it with `{needs}`"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"{named(name, address)}: {address.protocol}:// is not a known protocol ({error}). Use s3, gs, az, http, https, or "
            "another protocol of fsspec"
        ) from None
    except Exception as error:
        reason = without_secrets(f"{type(error).__name__}: {error}")
        raise DataError(f"{named(name, address)}: cannot be opened ({reason})") from None


class FilesystemStore:
    """A folder that fsspec opens. See Store. read() makes two requests: one for the bytes, and one for the version."""

    def __init__(self, address: Address, name: str) -> None:
        self.address = address
        self._system, self._root = open_filesystem(address, name)

    def version(self, name: str) -> Version:
        """See Store. Independent."""
        found = self._ask("info", self._path(name))
        return Version(int(found["size"]), self._tag(found))

    def read(self, name: str, start: int, stop: int, version: Version) -> bytes:
        """See Store. Independent."""
        data = self._ask("cat_file", self._path(name), start=start, end=stop)
        if (now := self.version(name)) != version:
            raise Changed(f"it was replaced on the server ({now.size:,} bytes, {version.size:,} bytes before)")
        return checked_length(data, start, stop)

    def write(self, name: str, content: IO[bytes], size: int) -> None:
        """See Store. Independent."""
        path = self._path(name)
        if self.address.protocol == "file":
            self._ask("makedirs", path.rpartition("/")[0], exist_ok=True)
        file = self._ask("open", path, "wb")
        try:
            left = size
            while left > 0 and (piece := content.read(min(PIECE, left))):
                file.write(piece)
                left -= len(piece)
            file.close()
        except Exception as error:
            _discard(file)
            raise self._translated(error) from None
        if (found := self.version(name).size) != size:
            raise Unreachable(f"{found:,} of {size:,} bytes were written")

    def names(self, folder: str) -> list[str]:
        """See Store. Independent."""
        root = self._root.rstrip("/") + "/"
        with suppress(Missing):
            return sorted(path.removeprefix(root) for path in self._ask("find", self._path(folder)))
        return []

    def delete(self, names: Iterable[str]) -> None:
        """See Store. Independent."""
        for name in names:
            with suppress(Missing):
                self._ask("rm_file", self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _tag(self, found: dict[str, Any]) -> str:
        """Return the values that change when a file is replaced. `found`: fsspec's information about the file, whose keys depend
        on the protocol."""
        keys = "ETag etag generation md5Hash content_md5 LastModified last_modified mtime created blob_id modify modificationTime"
        return "; ".join(str(found[key]) for key in keys.split() if found.get(key) is not None)

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            return getattr(self._system, method)(*arguments, **options)
        except Exception as error:
            raise self._translated(error) from None

    def _translated(self, error: Exception) -> Exception:
        """Return an exception of store.py for an exception of fsspec."""
        if isinstance(error, (Unreachable, Refused)):
            return error
        if isinstance(error, FileNotFoundError):
            return Missing("there is no such file")
        if isinstance(error, PermissionError):
            return Refused(f"no access ({error}). Credentials are read from {credentials_from(self.address.protocol)}")
        return Unreachable(f"{type(error).__name__}: {error}")


def _discard(file: Any) -> None:
    """Discard an incomplete file. Closing the file would store it."""
    try:
        file.discard()
    except Exception:  # not every filesystem has discard(); the size in the manifest shows that the file is incomplete
        file.closed = True

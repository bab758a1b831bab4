"""Opens the store of an address."""

from __future__ import annotations

from mpidp.errors import UsageError
from mpidp.storage.address import Address, address_problems
from mpidp.storage.filesystem import FilesystemStore
from mpidp.storage.s3 import S3Store
from mpidp.storage.store import Store
from mpidp.storage.web import WebStore


def open_store(address: str, name: str = "") -> Store:
    """Return the store of the folder at `address`, without a request to the server. `name`: the name of the setting that
    contains the address, for error messages. Raises UsageError if the address is not valid or needs a package that is missing.
    Raises DataError if the address cannot be opened. Independent."""
    for problem in address_problems(name, address):
        raise UsageError(problem)
    found = Address(address)
    if found.protocol in ("http", "https"):
        return WebStore(found)
    return S3Store(found, name) if found.protocol == "s3" else FilesystemStore(found, name)

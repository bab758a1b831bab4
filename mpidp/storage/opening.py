"""Opens the store of an address."""

from __future__ import annotations

from mpidp.errors import UsageError
from mpidp.storage.address import Address, address_problems
from mpidp.storage.filesystem import FilesystemStore
from mpidp.storage.s3 import S3Store
from mpidp.storage.store import Store
from mpidp.storage.web import WebStore


def open_store(address: str, name: str = "") -> Store:
    """Open the folder at an address, without a request. Raises UsageError if the address is not valid, or if the package of its
    protocol is missing. name: the setting, for errors. Independent."""
    for problem in address_problems(name, address):
        raise UsageError(problem)
    found = Address(address)
    if found.protocol in ("http", "https"):
        return WebStore(found)
    return S3Store(found, name) if found.protocol == "s3" else FilesystemStore(found, name)

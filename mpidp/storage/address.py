"""Addresses of folders in object storage (s3://bucket/prefix) and on web servers (https://host/folder).

An address must not contain credentials: it is written to config.toml, checkpoints, metrics and messages.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from mpidp.errors import UsageError

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://(.*)", re.IGNORECASE | re.DOTALL)
_ALMOST = re.compile(r"[\s'\"]*(?:[\w+.-]+::)?(?:s3|gs|gcs|az|abfss?|https?):.*", re.IGNORECASE | re.DOTALL)
_USER = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*:/*)[^\s/][^\s]*@")
_SHORTENED = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*:/+)[^\s/]*\.\.\.")  # libraries may shorten an address and leave out its @
_QUERY = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*:/+[^\s?#;'\"]*)(?:[?#]|;(?=[^\s'\"]))(?:[^\s'\",;)]|[,;)](?=[^\s'\"]))*")
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING")
_WHERE = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials", "http": "~/.netrc", "https": "~/.netrc",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS", "az": "AZURE_STORAGE_CONNECTION_STRING",
}


class Address(str):
    """The address of a folder or a file. `address / name` is the address of a file in the folder."""

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.rstrip('/')}/{name}")

    @property
    def protocol(self) -> str:
        """The part of the address before ://, in lower case."""
        return self.partition("://")[0].lower()


def is_remote(path: str | Path) -> bool:
    """Return whether a path is an address such as s3://bucket/prefix. Pure."""
    return isinstance(path, str) and _ADDRESS.fullmatch(path) is not None


def credentials_from(protocol: str) -> str:
    """Return a description of the place from which the credentials of a protocol are read. Pure."""
    return _WHERE.get(protocol, "the environment, as the documentation of the protocol's package describes")


def named(name: str, address: str) -> str:
    """Return an address without secrets, for an error message. `name`: the setting whose value is the address, or "". With a
    name, return NAME=ADDRESS. Pure."""
    shown = without_secrets(re.sub(r"[?#;].*", "?***", address, flags=re.DOTALL))
    return f"{name}={shown}" if name else shown


def check_local(option: str, path: str) -> None:
    """Raise UsageError if `path` is an address. `option`: the command-line option with the value `path`. It takes only local
    files. Pure."""
    if is_remote(path):
        raise UsageError(f"{option} {named('', path)} is an address, but this command uses local files. Copy the files first")


def address_problems(name: str, path: str) -> Iterator[str]:
    """Yield messages about what is wrong with an address. The messages contain no secrets. A local path has no problems.
    `name`: the setting whose value is `path`, or "". Pure."""
    found = _ADDRESS.fullmatch(path)
    if found is None:
        if _ALMOST.fullmatch(path):
            yield (f"{named(name, path)} is not an address. Write an address with two slashes and without quotes or spaces "
                   "before it, as in s3://bucket/prefix. Begin a local path of this name with ./")
        return
    protocol, rest = found[1].lower(), found[2]
    host = rest.partition("/")[0]
    if "@" in host or "@" in rest.partition(":")[2]:
        yield (f"{named(name, path)}: an address must not contain a user name or a password, because addresses are written to "
               f"config.toml and to messages. Give both in {credentials_from(protocol)}. Write an @ in a path of http as %40")
    elif any(mark in rest for mark in "?#;"):
        yield (f"{named(name, path)}: an address must not contain '?', '#' or ';'. Signed addresses are not "
               f"supported. Give credentials in {credentials_from(protocol)}")
    elif protocol in ("http", "https") and not _is_web(path):
        yield f"{named(name, path)}: the host or port is not valid. Write it as in https://host:8080/folder"
    elif not host and protocol not in ("memory", "file"):
        yield f"{named(name, path)}: an address needs a {'host' if protocol in ('http', 'https') else 'bucket'}, as in s3://bucket/prefix"


def _is_web(address: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(address)
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def without_secrets(text: str) -> str:
    """Return the text without secrets. In addresses, these are user names, passwords, queries and parameters (;sig=...). The
    secret values of environment variables, such as AWS_SECRET_ACCESS_KEY, are also removed. Independent."""
    text = _QUERY.sub(r"\1?***", _SHORTENED.sub(r"\1***...", _USER.sub(r"\1***@", text)))
    for name in _SECRETS:
        if len(value := os.environ.get(name, "")) >= 8:
            text = text.replace(value, "***")
    return text

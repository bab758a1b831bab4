"""Folders on a web server. Files are read with Python's own HTTP client. A HEAD request gets the version of a file, and a GET
request with the header Range gets bytes.

An answer must state the requested range (Content-Range) and the requested version (ETag, or Last-Modified if there is no ETag).
User name and password are read from ~/.netrc. Source: RFC 9110, sections 13 and 14.
"""

from __future__ import annotations

import base64
import http.client
import netrc
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from typing import IO, Any

from mpidp.errors import UsageError
from mpidp.storage.address import Address, credentials_from
from mpidp.storage.store import Changed, Missing, Refused, Unreachable, Version, checked_length

SILENT_SECONDS = 20.0  # a server that sends no data for this time counts as not answering
REQUEST_SECONDS = 120.0  # the longest duration of one request
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP codes of temporary errors
PIECE = 1 << 16
SAFE = "%/:[]@!$&'()*+,;=~"  # characters of an address that are not percent-encoded (RFC 3986)


class WebStore:
    """A folder on a web server. See Store."""

    def __init__(self, address: Address) -> None:
        self.address = address

    def version(self, name: str) -> Version:
        """See Store. Independent."""
        with self._open(name, "HEAD", {}) as answer:
            length = answer.headers.get("Content-Length", "")
            if not length.isdecimal():
                raise Refused("the server does not state the size of the file (in the header Content-Length)")
            return Version(int(length), _tag(answer))

    def read(self, name: str, start: int, stop: int, version: Version) -> bytes:
        """See Store. Independent."""
        wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if version.tag.startswith('"'):  # a strong ETag
            wanted["If-Match"] = version.tag
        with self._open(name, "GET", wanted) as answer:
            if _tag(answer) != version.tag:
                raise Changed(f"its version is {_tag(answer)}, but was {version.tag}")
            if answer.status == 200 and (start, stop) != (0, version.size):
                raise Refused("the server ignores the header Range and sends the whole file. Use a server that supports ranges "
                              "(nginx, Apache, object storage). Python's http.server does not support them")
            said = answer.headers.get("Content-Range", "")
            if answer.status == 206 and said != f"bytes {start}-{stop - 1}/{version.size}":
                raise Unreachable(f"the server sent the range {said!r} instead of bytes {start}-{stop - 1}/{version.size}")
            return checked_length(_body(answer, stop - start), start, stop)

    def write(self, name: str, content: IO[bytes], size: int) -> None:
        """Raise UsageError, because a web server accepts no files. Independent."""
        raise UsageError(f"{self.address}: nothing can be written to a web server. Use object storage, as in s3://bucket/prefix")

    def names(self, folder: str) -> list[str]:
        """Raise UsageError, because a web server does not list files. Independent."""
        raise UsageError(f"{self.address}: a web server does not list files. Use object storage, as in s3://bucket/prefix")

    def delete(self, names: Iterable[str]) -> None:
        """Raise UsageError, because files on a web server cannot be deleted. Independent."""
        raise UsageError(f"{self.address}: nothing can be deleted on a web server")

    def _open(self, name: str, method: str, headers: dict[str, str]) -> Any:
        url = urllib.parse.quote(self.address.rstrip("/"), SAFE) + "/" + urllib.parse.quote(name)
        request = urllib.request.Request(url, method=method, headers={"User-Agent": "mpidp", **headers})
        if login := _login(urllib.parse.urlsplit(url).hostname or ""):
            request.add_unredirected_header("Authorization", login)  # the header is not sent to another host
        try:
            return urllib.request.urlopen(request, timeout=SILENT_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            raise _translated(error.code) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise Refused(f"the certificate of the server is not valid ({error.reason.verify_message})") from None
            raise Unreachable(str(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(str(error) or type(error).__name__) from None


def _translated(code: int) -> Exception:
    if code in (401, 403):
        return Refused(f"no access (HTTP {code}). User name and password are read from {credentials_from('https')}")
    if code in (404, 410):
        return Missing(f"there is no such file (HTTP {code})")
    if code in (412, 416):
        return Changed(f"it was replaced on the server (HTTP {code})")
    return Unreachable(f"HTTP {code}") if code in PASSING else Refused(f"HTTP {code}")


def _login(host: str) -> str:
    """Return the value of the header Authorization, or "" if ~/.netrc does not name `host`."""
    try:
        found = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return ""
    return "" if found is None else "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()


def _tag(answer: Any) -> str:
    tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    if not tag:
        raise Refused("the server states neither ETag nor Last-Modified, so mpidp could not detect that a file was replaced. Use "
                      "a server that sends one of these headers")
    return re.sub(r"\s+", " ", tag)


def _body(answer: Any, size: int) -> bytes:
    """Return at most `size` bytes of an answer. Raises Unreachable if these bytes do not arrive within REQUEST_SECONDS."""
    pieces, until = [], time.monotonic() + REQUEST_SECONDS
    try:
        while size > 0 and (piece := answer.read1(min(size, PIECE))):
            pieces.append(piece)
            size -= len(piece)
            if time.monotonic() > until:
                raise Unreachable(f"the answer was not complete after {REQUEST_SECONDS:.0f} s")
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"the connection broke ({error or type(error).__name__})") from None
    return b"".join(pieces)

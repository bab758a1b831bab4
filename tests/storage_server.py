"""A web server with ranges, and a proxy in front of an S3 server. Both can fail on purpose.

`faults` decides for each request: it is called with the number of the request, the method and the path, and returns None or
    "503"      the server is busy
    "slow"     the answer comes after a while
    "cut"      the connection ends in the middle of the body
    "gone"     the connection ends without an answer
    "other"    another range than the one that was asked for, with its correct Content-Range
    "whole"    the header Range is ignored
    "no tag"   neither ETag nor Last-Modified
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SLOW_SECONDS = 0.2
Faults = Callable[[int, str, str], str | None]
Answer = tuple[int, dict[str, str], bytes]


class FaultyServer(ThreadingHTTPServer):
    """Serves on a free port of this machine. address: of the server, without a slash at the end."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, handler: type[BaseHTTPRequestHandler], faults: Faults) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults, self.requests, self.lock = faults, [], threading.Lock()
        self.requests: list[tuple[str, str, str]]  # method, path, range

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that end the connection are expected."""


class Handler(BaseHTTPRequestHandler):
    """Answers with answer(), and applies the faults."""

    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def answer(self, body: bytes) -> Answer:
        raise NotImplementedError

    def _do(self) -> None:
        body = self._body()
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((self.command, self.path, self.headers.get("Range", "")))
        fault = self.server.faults(number, self.command, self.path)
        if fault == "gone":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if fault == "other" and found:
            size = int(found[2]) - int(found[1])
            del self.headers["Range"]
            self.headers["Range"] = f"bytes={int(found[1]) + 1}-{int(found[1]) + 1 + size}"
        if fault == "whole":
            del self.headers["Range"]
        status, headers, content = (503, {}, b"busy") if fault == "503" else self.answer(body)
        self.send_response(status)
        for key, value in headers.items():
            if not (fault == "no tag" and key.lower() in ("etag", "last-modified")):
                self.send_header(key, value)
        if "content-length" not in {key.lower() for key in headers}:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        self.close_connection = self.close_connection or fault == "cut"

    def _body(self) -> bytes:
        """The body of the request, which may come in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _do  # noqa: N815

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        """Print nothing."""


def of_folder(root: Path) -> type[Handler]:
    """Return a handler that serves the files of a folder."""

    class Folder(Handler):
        def answer(self, body: bytes) -> Answer:
            path = root / urllib.parse.unquote(self.path).lstrip("/")
            if not path.is_file():
                return 404, {}, b""
            data = path.read_bytes()
            headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Accept-Ranges": "bytes"}
            if self.headers.get("If-Match", headers["ETag"]) != headers["ETag"]:
                return 412, headers, b""
            if self.command == "HEAD":
                return 200, headers | {"Content-Length": str(len(data))}, b""
            if (found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))) is None:
                return 200, headers, data
            part = data[int(found[1]) : int(found[2]) + 1]
            return 206, headers | {"Content-Range": f"bytes {found[1]}-{int(found[1]) + len(part) - 1}/{len(data)}"}, part

    return Folder


def before(upstream: str) -> type[Handler]:
    """Return a handler that passes requests on to another server."""

    class Proxy(Handler):
        def answer(self, body: bytes) -> Answer:
            dropped_here = ("connection", "expect", "transfer-encoding", "content-length")
            headers = {"Content-Type": "binary/octet-stream"}  # urllib's default is a form
            headers |= {key: value for key, value in self.headers.items() if key.lower() not in dropped_here}
            request = urllib.request.Request(upstream + self.path, body or None, headers, method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=30) as found:
                    status, said, content = found.status, found.headers, found.read()
            except urllib.error.HTTPError as error:
                status, said, content = error.code, error.headers, error.read()
            dropped = ("connection", "transfer-encoding", "server", "date") + ("content-length",) * (self.command != "HEAD")
            return status, {key: value for key, value in said.items() if key.lower() not in dropped}, content

    return Proxy


def no_faults(number: int, method: str, path: str) -> str | None:
    """Answer every request."""
    return None


@contextmanager
def serving(handler: type[Handler], faults: Faults = no_faults) -> Iterator[FaultyServer]:
    """Return a context in which the server runs in a thread."""
    server = FaultyServer(handler, faults)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

"""Reads ranges of bytes of a remote file through the cache. Other threads can fetch a range before a reader needs it."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import count
from queue import PriorityQueue
from typing import Any, TypeVar

import numpy as np

from mpidp.errors import DataError
from mpidp.storage.address import Address
from mpidp.storage.cache import BLOCK, BlockCache
from mpidp.storage.retry import Retries
from mpidp.storage.store import Missing, Store, Version

T = TypeVar("T")
REQUEST_BLOCKS = 16  # blocks per request (4 MiB)
FETCHERS = 4  # number of simultaneous requests for a folder
URGENT, AHEAD = 0, 1  # priorities of requests: URGENT if a reader waits, else AHEAD


class Fetchers:
    """Threads that make requests. Requests for which a reader waits are made first. Requests with the same priority are made
    in the order of submission. The process can end while a thread waits for a server (daemon threads). Independent."""

    def __init__(self) -> None:
        self._queue: PriorityQueue[tuple[int, int, Callable[[], None]]] = PriorityQueue()
        self._number = count()
        for _ in range(FETCHERS):
            threading.Thread(target=self._run, name="mpidp-fetch", daemon=True).start()

    def submit(self, priority: int, work: Callable[[], None]) -> None:
        """Call work() in a thread. `priority`: URGENT or AHEAD. Independent."""
        self._queue.put((priority, next(self._number), work))

    def _run(self) -> None:
        while True:
            self._queue.get()[2]()


class RemoteFile:
    """One version of one file of a store. Thread-safe. Independent.

    read() raises DataError if the server does not answer within the time limit of `retries` or refuses the request, or if the
    file was replaced or deleted on the server.
    """

    def __init__(
        self, store: Store, name: str, version: Version, cache: BlockCache, retries: Retries, fetchers: Fetchers
    ) -> None:
        self.address: Address = store.address / name
        self.size = version.size
        self._store, self._name, self._version = store, name, version
        self._cache, self._retries, self._fetchers = cache, retries, fetchers
        self.key = hashlib.sha256(f"{self.address}\n{version.size}\n{version.tag}\n{BLOCK}".encode()).hexdigest()[:40]
        self._lock = threading.Lock()
        self._coming: dict[int, Future[dict[int, bytes]]] = {}  # block -> the request that fetches it
        self._groups: dict[Future[dict[int, bytes]], range] = {}  # the blocks of each request

    def read(self, start: int, size: int) -> bytes:
        """Return bytes [start, start + size). Bytes that are not in the cache are fetched."""
        if start < 0 or start + size > self.size:
            raise DataError(f"{self.address}: bytes [{start}, {start + size}) are outside the file of {self.size:,} bytes")
        found = {number: self._cached(number, first, last) for number, first, last in self._places(start, size)}
        requests = self._request([number for number, piece in found.items() if piece is None], URGENT)
        for number, first, last in self._places(start, size) if requests else ():
            if number in requests:
                found[number] = requests[number].result()[number][first:last]
        return b"".join(piece for piece in found.values() if piece is not None)

    def advise(self, start: int, size: int) -> None:
        """Begin to fetch bytes [start, start + size) in other threads, and return immediately. Raises no error if a request
        fails. A later read() of these bytes raises the error, or fetches the bytes again."""
        self._request([number for number, *_ in self._places(start, size) if self._cached(number, 0, 0) is None], AHEAD)

    def forget(self) -> None:
        """Delete the blocks of this file from the cache."""
        self._cache.forget(self.key)

    def _places(self, start: int, size: int) -> Iterator[tuple[int, int, int]]:
        """For each block of the range, yield (number of the block, first byte, end). The range covers bytes [first byte, end) of
        the block."""
        for number in range(start // BLOCK, -(-(start + size) // BLOCK)):
            at = number * BLOCK
            yield number, max(0, start - at), min(start + size - at, BLOCK)

    def _block_size(self, number: int) -> int:
        return min(BLOCK, self.size - number * BLOCK)

    def _cached(self, number: int, first: int, last: int) -> bytes | None:
        return self._cache.read(self.key, number, self._block_size(number), first, last)

    def _request(self, numbers: Iterable[int], priority: int) -> dict[int, Future[dict[int, bytes]]]:
        """Begin to fetch blocks, and return {block: the request that fetches it}. If a block is already being fetched, return
        the earlier request for this block, and make this request urgent if `priority` is URGENT."""
        requests: dict[int, Future[dict[int, bytes]]] = {}
        with self._lock:
            for number in numbers:
                if number in self._coming:
                    requests[number] = self._coming[number]
            new: list[tuple[Future[dict[int, bytes]], range]] = [
                (Future(), group) for group in _groups([number for number in numbers if number not in requests])
            ]
            for future, group in new:
                self._coming |= dict.fromkeys(group, future)
                requests |= dict.fromkeys(group, future)
                self._groups[future] = group
            for future in dict.fromkeys(requests.values()):
                self._fetchers.submit(priority, partial(self._run, future, self._groups[future]))
        return requests

    def _run(self, future: Future[dict[int, bytes]], group: range) -> None:
        """Fetch the blocks with the numbers `group`, and store them in the cache. Set the result of `future` to
        {block: its bytes}."""
        with self._lock:  # a request that became more urgent is in the queue a second time
            if future.running() or future.done():
                return
            future.set_running_or_notify_cancel()
        try:
            blocks = self._fetch(group)
            self._cache.write(self.key, blocks)
            future.set_result(blocks)
        except BaseException as error:
            future.set_exception(error)
        finally:
            with self._lock:
                del self._groups[future]
                for number in group:
                    del self._coming[number]

    def _fetch(self, group: range) -> dict[int, bytes]:
        start, stop = group.start * BLOCK, min(group.stop * BLOCK, self.size)
        try:
            data = self._retries.call(self.address, lambda: self._store.read(self._name, start, stop, self._version))
        except Missing as error:
            raise DataError(f"{self.address}: {error}. It was deleted on the server during the run") from None
        return {number: data[(number - group.start) * BLOCK : (number - group.start + 1) * BLOCK] for number in group}


def _groups(numbers: list[int]) -> Iterator[range]:
    """Divide the numbers into ranges of at most REQUEST_BLOCKS consecutive numbers, and yield the ranges. Pure."""
    at = 0
    while at < len(numbers):
        end = at + 1
        while end < len(numbers) and end - at < REQUEST_BLOCKS and numbers[end] == numbers[end - 1] + 1:
            end += 1
        yield range(numbers[at], numbers[end - 1] + 1)
        at = end


class RemoteArray:
    """A part of a remote file, read as a vector. A slice of the vector is a numpy array, which is fetched from the file. After
    the slice [:], the whole vector stays in memory."""

    def __init__(self, file: RemoteFile, dtype: np.dtype[Any], offset: int, count: int) -> None:
        self._file, self._dtype, self._offset, self.size = file, dtype, offset, count
        self._whole: np.ndarray | None = None

    def __getitem__(self, places: slice) -> np.ndarray:
        first, last, _ = places.indices(self.size)
        if self._whole is not None:
            return self._whole[first:last]
        width = self._dtype.itemsize
        found = np.frombuffer(self._file.read(self._offset + first * width, max(0, last - first) * width), self._dtype)
        if places == slice(None):
            self._whole = found
        return found


class RemoteReader(io.RawIOBase):
    """A Python file object that reads a remote file. HDF5 and the computation of checksums use it."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file, self._at = file, 0

    def readable(self) -> bool:
        """Return True. Pure."""
        return True

    def seekable(self) -> bool:
        """Return True. Pure."""
        return True

    def tell(self) -> int:
        """Return the position in the file, in bytes. Pure."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position, as seek() of Python files does, and return it. Independent."""
        self._at = offset + (0, self._at, self._file.size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read from the position into `buffer`, and return the number of bytes that were read. Independent."""
        size = max(0, min(len(buffer), self._file.size - self._at))
        buffer[:size] = self._file.read(self._at, size)
        self._at += size
        return size


class HeaderReader(RemoteReader):
    """A Python file object for h5py. Its readinto() never waits for the server, because h5py holds a global lock while it
    calls readinto(). A thread that fetches blocks may need this lock, for example to collect garbage that contains h5py
    objects. If readinto() waited for this thread, there would be a deadlock."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__(file)
        self._held: dict[tuple[int, int], bytes] = {}  # (position, size) -> the bytes
        self._missing: tuple[int, int] | None = None

    def run(self, work: Callable[[HeaderReader], T]) -> T:
        """Return work(self). If `work` could not read some bytes, because they had not been fetched, fetch these bytes and
        call `work` again. Independent."""
        while True:
            self._at, self._missing, error = 0, None, None
            try:
                found = work(self)
            except Exception as raised:
                error = raised
            if self._missing is not None:
                self._held[self._missing] = self._file.read(*self._missing)
            elif error is not None:
                raise error
            else:
                return found

    def readinto(self, buffer: Any) -> int:
        """Read from the position into `buffer`, and return the number of bytes. Raises BlockingIOError if these bytes have not
        been fetched. Independent."""
        place = self._at, max(0, min(len(buffer), self._file.size - self._at))
        if place not in self._held:
            self._missing = self._missing or place
            raise BlockingIOError(f"{self._file.address}: bytes {place} have not been fetched")
        buffer[: place[1]] = self._held[place]
        self._at += place[1]
        return place[1]

"""A local folder with blocks (ranges of BLOCK bytes) of remote files. The processes of a node share the folder, and several
jobs may share it.

    CACHE/blocks/KEY/NUMBER   one block of a file: its bytes, then their crc32. KEY identifies the file and its version
    CACHE/folders/KEY/...     index.json, tokenizer.json and special_tokens.json of a folder of shards
    CACHE/used                an upper bound on the bytes on disk
    CACHE/lock                locked while blocks are written or deleted

A block is written to a temporary file, which is then renamed. When a process reads a block for the first time, it checks the
crc32. Therefore an incomplete block is never used, even after a crash. Before a block is written, its bytes are added to
CACHE/used. If the sum would exceed the limit, the least recently read blocks are deleted before the block is written.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mpidp.errors import DataError
from mpidp.runtime.files import temporary_name

CRC_BYTES = 4
BLOCK = 2**18 - CRC_BYTES  # bytes of a block; with its crc32 it fills whole pages of a disk
PAGE = 4096  # files grow on disk by this many bytes
MOST_SEEN = 10**5  # number of checked blocks that a process remembers
TOUCH_SECONDS = 30.0  # interval at which the time of a block in use is renewed
KEPT_SHARE = 0.9  # blocks are deleted until at most this fraction of the bound is used


def default_folder() -> Path:
    """Return the folder of the cache that is used if data.cache_dir is empty. Each user has one, in the system's temporary
    folder. Independent."""
    return Path(tempfile.gettempdir()) / f"mpidp-cache-{os.getuid()}"


class BlockCache:
    """A cache of blocks (ranges of bytes) in a local folder. `key` identifies a file and its version. Several threads and
    processes may use the same folder. Independent."""

    def __init__(self, folder: Path, bound: int) -> None:
        """Create `folder` if needed. `bound`: the largest number of bytes on disk. Raises DataError if the folder cannot be
        used."""
        self.folder, self.bound = folder, bound
        self._seen: dict[tuple[str, int], float] = {}  # when this process last touched a block that it has checked
        with self._usable():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / "blocks").mkdir(exist_ok=True, mode=0o700)
            about = os.lstat(folder)
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
                raise OSError(errno.EPERM, "it belongs to another user, or is a link")
            with self.locked():
                (folder / "used").unlink(missing_ok=True)  # counted again, because after a crash it may be too large

    def read(self, key: str, number: int, size: int, start: int, stop: int) -> bytes | None:
        """Return bytes [start, stop) of block number `number` of the file `key`. Return None if the block is missing or
        incomplete. `size`: the number of bytes of the block."""
        path = self._path(key, number)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            now, seen = time.monotonic(), self._seen.get((key, number))
            if seen is None and not _is_whole(os.pread(handle, size + CRC_BYTES + 1, 0), size):
                path.unlink(missing_ok=True)
                return None
            if seen is None or now - seen > TOUCH_SECONDS:
                with suppress(OSError):
                    os.utime(handle)
                if len(self._seen) >= MOST_SEEN:
                    self._seen = {}
                self._seen[key, number] = now
            data = os.pread(handle, stop - start, start)
            return data if len(data) == stop - start else None
        finally:
            os.close(handle)

    def write(self, key: str, blocks: Mapping[int, bytes]) -> None:
        """Store blocks of the file `key`. `blocks`: {number of the block: its bytes}. Raises DataError if the disk is full or
        the folder cannot be written."""
        with self._usable(), self.locked():
            self._make_room(sum(_on_disk(len(data)) for data in blocks.values()))
            try:
                self._store(key, blocks)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._delete_oldest(self.bound // 2)  # files outside the cache have filled the disk
                self._store(key, blocks)

    def forget(self, key: str) -> None:
        """Delete all blocks of the file `key`. Independent."""
        with self.locked():
            for path in (self.folder / "blocks" / key).glob("*"):
                path.unlink(missing_ok=True)
        self._seen = {place: when for place, when in self._seen.items() if place[0] != key}

    @contextmanager
    def locked(self, name: str = "lock") -> Iterator[None]:
        """Run the body of a `with` statement while holding a lock of the cache. Other processes and threads wait for the lock.
        `name`: the file name of the lock. Independent."""
        handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"the cache {self.folder} cannot be used ({error.strerror or error}). Set data.cache_dir to a folder "
                            "on a local disk of each node, or make data.cache_gb smaller") from None

    def _path(self, key: str, number: int) -> Path:
        return self.folder / "blocks" / key / str(number)

    def _store(self, key: str, blocks: Mapping[int, bytes]) -> None:
        (self.folder / "blocks" / key).mkdir(exist_ok=True, mode=0o700)
        for number, data in blocks.items():
            path = self._path(key, number)
            temporary = temporary_name(path)
            try:
                with open(temporary, "xb") as file:
                    file.write(data + zlib.crc32(data).to_bytes(CRC_BYTES, "little"))
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Add `size` to the number in CACHE/used. If the result would exceed the bound, delete blocks first. The caller holds the
        lock."""
        try:
            used = int((self.folder / "used").read_text())
        except (OSError, ValueError):
            used = self._delete_oldest(self.bound - size)
        if used + size > self.bound:
            used = self._delete_oldest(min(self.bound - size, int(KEPT_SHARE * self.bound)))
        (self.folder / "used").write_text(str(used + size))

    def _delete_oldest(self, most: int) -> int:
        """Delete temporary files, and the least recently read blocks, until at most `most` bytes are used. Return the number of
        used bytes. The caller holds the lock, so no process is writing any of the temporary files."""
        found, used = [], sum(_on_disk(path.stat().st_size) for path in (self.folder / "folders").glob("*/*"))
        for folder in list((self.folder / "blocks").iterdir()):
            for path in list(folder.iterdir()):
                if path.name.startswith("."):
                    path.unlink(missing_ok=True)
                else:
                    about = path.stat()
                    found.append((about.st_mtime_ns, about.st_size, path))
                    used += _on_disk(about.st_size - CRC_BYTES)
            with suppress(OSError):
                folder.rmdir()  # removes only an empty folder
        for _, size, path in sorted(found):
            if used <= most:
                break
            path.unlink(missing_ok=True)
            used -= _on_disk(size - CRC_BYTES)
        return used


def _is_whole(content: bytes, size: int) -> bool:
    return len(content) == size + CRC_BYTES and zlib.crc32(content[:size]) == int.from_bytes(content[size:], "little")


def _on_disk(size: int) -> int:
    return -(-(size + CRC_BYTES) // PAGE) * PAGE

"""Remote folders of shards. The small files of a folder are copied to the cache. The shards are read in ranges of bytes through
the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mpidp.errors import DataError
from mpidp.runtime.files import write_file
from mpidp.runtime.log import log
from mpidp.storage.address import Address
from mpidp.storage.cache import BLOCK, BlockCache, default_folder
from mpidp.storage.opening import open_store
from mpidp.storage.ranges import REQUEST_BLOCKS, Fetchers, RemoteFile
from mpidp.storage.retry import Retries
from mpidp.storage.store import Missing, Version

INDEX = "index.json"
OLD_SECONDS = 30 * 86400.0  # copies of small files that were not used for this long are deleted


class CacheOptions(NamedTuple):
    """Where remote files are cached, and how long failed requests are repeated."""

    folder: str = ""  # "": default_folder()
    gigabytes: float = 10.0  # largest size of the cache, in 10**9 bytes
    retry_seconds: float = 300.0


DEFAULT_CACHE = CacheOptions()


class RemoteFolder:
    """A folder of shards at an address. Independent. Thread-safe.

    `path`: the address of the folder. `local`: a local folder with copies of index.json, tokenizer.json and special_tokens.json.
    The constructor fetches these files, unless they are in the cache. It raises UsageError if the address is not valid, and
    DataError if the server refuses a request or does not answer.
    """

    def __init__(self, address: str, options: CacheOptions = DEFAULT_CACHE) -> None:
        self._store = open_store(address)
        self.path: Address = self._store.address
        self.cache = BlockCache(Path(options.folder or default_folder()), int(options.gigabytes * 1e9))
        self._retries = Retries(options.retry_seconds)
        self._fetchers: Fetchers | None = None
        self._versions: dict[str, Version] = {}  # versions of the files that this or another rank has opened
        self.local = self._fetch_small_files()

    def open_file(self, name: str) -> RemoteFile:
        """Open a file. Raises FileNotFoundError if the file is missing. Raises DataError if the file was replaced after this job
        first opened it."""
        try:
            version = self._version(name)
        except Missing:
            raise FileNotFoundError(name) from None
        if (known := self._versions.setdefault(name, version)) != version:
            raise DataError(f"{self.path / name}: it was replaced on the server during the run ({version.size:,} bytes, "
                            f"{known.size:,} bytes before). Restore the file. Then the same command resumes the run")
        if self._fetchers is None:
            self._fetchers = Fetchers()
        return RemoteFile(self._store, name, version, self.cache, self._retries, self._fetchers)

    @property
    def versions(self) -> dict[str, Version]:
        """{name: version} of the files that this rank has opened, and of the files that expect() has recorded."""
        return dict(self._versions)

    def expect(self, versions: Mapping[str, Version]) -> None:
        """Record the versions that another rank has found. open_file() later raises DataError if a file has another version.
        `versions`: {name: version}. Raises DataError if this rank has already found another version of a file."""
        for name, version in versions.items():
            if self._versions.setdefault(name, version) != version:
                raise DataError(f"{self.path / name}: it was replaced on the server while this job started. Start the job again")

    def check_room(self, size: int) -> None:
        """Log a warning if the cache is smaller than `size`. `size`: the number of bytes that a node reads ahead at a time."""
        if size > self.cache.bound:
            log.warning("warning: data.cache_gb=%.3g is too small: a node reads %.3g GB of %s at a time, so the same data "
                        "must be fetched repeatedly. Increase data.cache_gb", self.cache.bound / 1e9, size / 1e9, self.path)

    def report_waits(self, on_wait: Callable[[], None]) -> None:
        """Call `on_wait` about every second during a pause between two tries of a request, and after each answer."""
        self._retries.report_waits(on_wait)

    def _version(self, name: str) -> Version:
        version = self._retries.call(self.path / name, lambda: self._store.version(name))
        if not version.tag:
            raise DataError(f"{self.path / name}: the server states no version or time of modification, so a replaced file could "
                            "not be detected. Copy the shards to disk")
        return version

    def _fetch_small_files(self) -> Path:
        with self.cache.locked("folders.lock"):  # the other processes of this node wait until the files are copied
            try:
                version = self._version(INDEX)
            except Missing as error:
                raise DataError(f"no shards at {self.path} ({INDEX}: {error}). Prepare them in a local folder with `mpidp "
                                "prepare`, and copy the folder") from None
            key = hashlib.sha256(f"{self.path}\n{version.size}\n{version.tag}".encode()).hexdigest()[:40]
            folder = self.cache.folder / "folders" / key
            _delete_old(folder.parent)
            if not (folder / INDEX).exists():
                self._copy_small_files(folder, version)
            os.utime(folder)
            return folder

    def _copy_small_files(self, folder: Path, version: Version) -> None:
        """Copy the files that index.json names, and then index.json itself."""
        index = self._read_whole(INDEX, version)
        wanted: dict[str, str] = {}
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # read_index() reports what is wrong with the index
            raw = json.loads(index)
            wanted = {f"{key}.json": str(raw[key]["sha256"]) for key in ("tokenizer", "special_tokens") if key in raw}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, sha256 in wanted.items():
            try:
                content = self._read_whole(name, self._version(name))
            except Missing as error:
                raise DataError(f"{self.path / name}: {error}. Copy the whole folder of shards again") from None
            if hashlib.sha256(content).hexdigest() != sha256:
                raise DataError(f"{self.path / name}: changed after {INDEX} was written. Copy the whole folder of shards again")
            write_file(folder / name, content)
        write_file(folder / INDEX, index)

    def _read_whole(self, name: str, version: Version) -> bytes:
        pieces, step = [], BLOCK * REQUEST_BLOCKS
        for at in range(0, version.size, step):
            end = min(at + step, version.size)
            pieces.append(self._retries.call(
                self.path / name, lambda at=at, end=end: self._store.read(name, at, end, version)  # type: ignore[misc]
            ))
        return b"".join(pieces)


def _delete_old(folders: Path) -> None:
    """Delete each copy of small files that no command has used for OLD_SECONDS."""
    for folder in folders.glob("*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > OLD_SECONDS:
                shutil.rmtree(folder)

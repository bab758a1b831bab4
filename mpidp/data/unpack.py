"""Opens a file for reading its bytes. Files compressed with gzip or zstandard are decompressed. Memory use is bounded.
Independent.

The compression is recognized by the first bytes of the file. The name does not have to end in .gz or .zst.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mpidp.errors import DataError, UsageError

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # the first bytes of a file
SUFFIXES = {".gz": GZIP, ".zst": ZSTD}
SKIPPABLE = 0x184D2A50  # the first number of a zstandard frame without content; its last four bits may have any value
MAX_WINDOW = 2**31  # bytes; the largest window that `zstd --long` writes
PIECE_BYTES = 2**17
MAX_ROW_BYTES = 2**26  # longest line of JSON, and largest .json array; limits the memory that a row needs
MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Return a context for reading a file. In this context, an OSError, EOFError or zlib.error becomes a DataError that names the
    file. Independent."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}. Replace or remove the file") from None


def is_regular(path: str | Path) -> bool:
    """Return False for a FIFO, a socket, a device or a folder. Check this before opening a file, because opening a FIFO waits for
    a writer. Independent."""
    return stat.S_ISREG(os.stat(path).st_mode)


def packing(path: str | Path) -> bytes:
    """Return the compression of a file: GZIP, ZSTD, or b"" if it is not compressed. Independent.

    Raises OSError if the name ends in .gz or .zst, but the content is not in this format. Raises UsageError if the decompressor
    is missing.
    """
    with open(path, "rb") as file:
        head = file.read(4)
    skippable = len(head) == 4 and int.from_bytes(head, "little") & ~0xF == SKIPPABLE
    found = GZIP if head.startswith(GZIP) else ZSTD if head == ZSTD or skippable else b""
    promised = SUFFIXES.get(Path(path).suffix.lower(), b"")
    if ZSTD in (found, promised):
        zstandard(path)
    if promised and head and found != promised:
        raise OSError(f"damaged, or not {'gzip' if promised == GZIP else 'zstandard'} data (the file begins with {head!r})")
    return found


def zstandard(path: str | Path) -> Any:
    """Import and return the module zstandard. `path`: the file to read. Errors name it. Raises UsageError if the module is
    missing. Independent."""
    try:
        import zstandard as library
    except ImportError:
        raise UsageError(f"{path}: reading .zst needs zstandard. Run pip install 'mpidp[data]'") from None
    return library


def open_bytes(path: str | Path) -> BinaryIO:
    """Return a stream of the decompressed bytes of a regular file. Raises OSError if the file cannot be opened, and UsageError if
    the decompressor is missing. Independent."""
    found = packing(path)
    if found == GZIP:
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if found == ZSTD:
        return io.BufferedReader(ZstdStream(path), PIECE_BYTES)
    return open(path, "rb")


def lines_of(stream: BinaryIO) -> Iterator[bytes | None]:
    """Yield the lines of a stream, with their newlines. If a line has more than MAX_ROW_BYTES, yield None instead of the line.
    Independent."""
    while line := stream.readline(MAX_ROW_BYTES + 1):
        if len(line) <= MAX_ROW_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while (rest := stream.readline(2**20)) and not rest.endswith(b"\n"):
            pass
        yield None


class ZstdStream(io.RawIOBase):
    """A stream of the decompressed bytes of a zstandard file, which may have any number of frames.

    Blocks are decompressed one by one. A block has at most 128 KiB of content. Memory use therefore depends only on the window
    size of the frames, not on the compression ratio. Reading a truncated file raises OSError.
    """

    def __init__(self, path: str | Path) -> None:
        self._zstandard = zstandard(path)
        self._file = open(path, "rb")  # noqa: SIM115 - close() closes
        self._pieces = self._frames()
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _exactly(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise OSError("the compressed data ends too early")
        return data

    def _frames(self) -> Iterator[bytes]:
        while magic := self._file.read(4):
            if int.from_bytes(magic, "little") & ~0xF == SKIPPABLE:
                left = int.from_bytes(self._exactly(4), "little")
                while left:
                    left -= len(self._exactly(min(left, PIECE_BYTES)))
            elif magic == ZSTD:
                yield from self._frame()
            elif len(magic) < 4:
                self._exactly(4)
            else:
                raise OSError("damaged zstandard data (other data follows a frame)")

    def _frame(self) -> Iterator[bytes]:
        """Yield the content of a frame, block by block (RFC 8878, section 3.1.1)."""
        described = self._exactly(1)
        flags = described[0]
        single = flags >> 5 & 1
        header = ZSTD + described + self._exactly((not single) + (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6])
        window = 0
        try:
            window = self._zstandard.get_frame_parameters(header).window_size
            decompressor = self._zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
            yield decompressor.decompress(header)
            last = False
            while not last:
                start = self._exactly(3)
                number = int.from_bytes(start, "little")
                last, is_repeat, size = bool(number & 1), number >> 1 & 3 == 1, number >> 3
                yield decompressor.decompress(start + self._exactly(1 if is_repeat else size))
            if flags & 4:
                yield decompressor.decompress(self._exactly(4))
        except (self._zstandard.ZstdError, MemoryError) as error:
            if isinstance(error, MemoryError) or "memory" in str(error):
                raise OSError(f"its zstandard window needs {window / 2**20:,.0f} MiB of memory, which is too much. Compress the "
                              "file again without the option --long") from None
            raise OSError(f"damaged zstandard data ({error})") from None

"""Checksums of files."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import IO

from mpidp.runtime.files import open_regular

PIECE_BYTES = 4 * 2**20  # bytes read and hashed at a time


def checksums(path: Path) -> tuple[str, str]:
    """Return (crc32, sha256) of a file, in hexadecimal. Independent."""
    with open_regular(path) as file:
        return checksums_of(file)


def checksums_of(file: IO[bytes]) -> tuple[str, str]:
    """Return (crc32, sha256) of the rest of an open file, in hexadecimal. Independent."""
    crc32, sha256 = 0, hashlib.sha256()
    while piece := file.read(PIECE_BYTES):
        crc32 = zlib.crc32(piece, crc32)
        sha256.update(piece)
    return f"{crc32:08x}", sha256.hexdigest()

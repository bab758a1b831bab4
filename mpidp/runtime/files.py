"""Atomic file writes: after a crash a file is either complete or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def write_file(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Write a file atomically: write a temporary file, fsync, rename it to path.

    content: the bytes, a text (written as UTF-8), or a function that writes the temporary file. If a write fails, removes the
    temporary file and raises OSError with the path. Independent.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """fsync a directory, so that renames in it survive a crash of the machine. Independent."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

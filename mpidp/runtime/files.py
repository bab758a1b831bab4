"""Reads only regular files, and writes files atomically. After a crash, a file has either its complete old content or its
complete new content."""

from __future__ import annotations

import errno
import os
import re
import resource
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO

from mpidp.errors import UsageError

MANY_FILES = 1 << 16  # the limit of open files is not raised above this number, because a high limit makes some programs slow


def expand_home(path: str, what: str) -> str:
    """Return the path with a leading ~ or ~USER replaced by the home folder. A shell does not replace the ~ in
    `--run.dir=~/x`. `what`: the name of the setting or option that contains the path, for error messages. Raises UsageError if
    the home folder is unknown, or if the path contains the name of a set environment variable, such as $HOME. Independent."""
    full = os.path.expanduser(path)
    if full.startswith("~") and full == path:
        user = path.partition("/")[0]
        raise UsageError(f"{what}={path}: the home folder of {user} is unknown. Write the whole path, or ./{path}")
    name = re.search(r"\$(?:\{(\w+)\}|(\w+))", path)
    if name is not None and (name[1] or name[2]) in os.environ:
        raise UsageError(f"{what}={path}: {name[0]} is not expanded here. Write the whole path, or ~ for the home folder")
    return full


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a regular file for reading. Raises OSError if the path is a FIFO, a device or a folder. Independent."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: a FIFO would wait for its writer
    mode = os.fstat(handle).st_mode
    if S_ISREG(mode):
        return open(handle, "rb")
    os.close(handle)
    if S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def create_file(path: Path) -> IO[bytes]:
    """Create a file for writing. Raises FileExistsError if a file, folder or link with this name exists. Independent."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


def temporary_name(path: Path) -> Path:
    """Return a path for a temporary file in the folder of `path`. The name is hidden. It is also random, so other users cannot
    create a link with this name in advance. Independent."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def write_file(path: Path, content: bytes | str | Callable[[Path], None], sync_folder: bool = True) -> None:
    """Write a file atomically: write a temporary file, fsync it, and rename it to `path`.

    `content`: bytes, a text (written as UTF-8), or a function. The function gets a path, and must write the file there.
    `sync_folder`: whether to fsync the folder after the rename. Raises OSError with the path if a write fails. Independent.
    """
    temporary = temporary_name(path)
    try:
        with create_file(temporary) as file:
            if not callable(content):
                file.write(content.encode() if isinstance(content, str) else content)
        if callable(content):
            content(temporary)
        with open_regular(temporary) as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)  # the messages of libraries may be long
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    if sync_folder:
        sync_directory(path.parent)


def check_writable(path: str | Path) -> None:
    """Raise UsageError if the file named by --out cannot be created. Call this before the command does any work. Independent."""
    if Path(path).is_dir() or not os.access(Path(path).absolute().parent, os.W_OK | os.X_OK):
        raise UsageError(f"--out {path} cannot be written. Give a file in an existing, writable folder")


@contextmanager
def writing(what: str | Path, advice: str) -> Iterator[None]:
    """Run the body of a `with` statement, which writes files. Raises UsageError if the body raises OSError, for example because
    the disk is full. The message names the file of the OSError, or else `what`. `advice`: the end of the message. Independent."""
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, (str, Path)) else what
        raise UsageError(f"{name} cannot be written ({error.strerror or error}): {advice}") from error


def most_open_files() -> int:
    """Increase this process's limit of open files to MANY_FILES, or to less if the system permits only less. Return the limit.
    Independent."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return MANY_FILES if soft == resource.RLIM_INFINITY else soft


def sync_directory(path: Path) -> None:
    """Call fsync on a folder, so that renames in the folder survive a crash of the machine. Independent."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

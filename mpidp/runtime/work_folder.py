"""Makes the temporary folder in which a command writes its output. The complete output is then renamed to its final place."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mpidp.errors import UsageError
from mpidp.runtime.files import writing

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # file systems without locks


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """Return a context that creates an empty folder beside `out`, and yields its path. At the end of the context, the folder is
    removed, unless it was renamed. Files that a killed process left in the folder are deleted. Raises UsageError if another
    process is writing `out`, or if the folder cannot be created. Independent."""
    folder = out.with_name(f".{out.name}.part")
    with writing(folder, "choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise UsageError(f"{out} is being written by another process. Wait for it, or choose another --out") from None
        if not folder.is_dir() or not os.path.samestat(os.fstat(handle), os.stat(folder)):
            raise UsageError(f"{out} was written by another process at the same time. Choose another --out")
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            yield folder
        finally:
            with suppress(OSError):
                if os.path.samestat(os.fstat(handle), os.stat(folder)):
                    shutil.rmtree(folder)
    finally:
        os.close(handle)

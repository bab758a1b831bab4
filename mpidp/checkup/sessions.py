"""What killed mpiruns of Open MPI left behind: a session folder named after the process. The next mpirun that gets the same
number does not start in it ("The PMIx server's listener thread failed to start")."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mpidp.checkup.findings import Finding, listed

OF_MPIRUN = re.compile(r"(?:ompi|prte\..*)\.(\d+)")


@dataclass(frozen=True)
class Session:
    """A folder of an mpirun of this user that is not there any more."""

    host: str
    path: str

    def __str__(self) -> str:
        return f"{self.host}:{self.path}"


def find(host: str, folder: Path | None = None) -> list[Session]:
    """Those of this user whose process is gone; folder: where temporary files go, by default. Independent."""
    found = []
    for path in sorted((folder or Path(tempfile.gettempdir())).iterdir()):
        with suppress(OSError):  # removed meanwhile
            named = OF_MPIRUN.fullmatch(path.name)
            mine = path.is_dir() and not path.is_symlink() and path.lstat().st_uid == os.getuid()
            if named and mine and not Path(f"/proc/{named[1]}").exists():
                found.append(Session(host, str(path)))
    return found


def clean(sessions: Sequence[Session]) -> list[Session]:
    """Remove them, where their processes are still gone; which those were. Independent."""
    removed = []
    for one in sessions:
        path = Path(one.path)
        if one in find(one.host, path.parent):
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                removed.append(one)
    return removed


def check_sessions(sessions: Sequence[Session], removed: Sequence[Session]) -> Finding:
    """What is left of them. Pure."""
    left = [one for one in sessions if one not in removed]
    if left:
        words = f"of mpiruns of yours that were killed: {len(left)}\n{listed([str(one) for one in left])}"
        fix = "--clean removes them: an mpirun that gets one of these process numbers would not start"
        return Finding("old sessions", "note", words, fix)
    if removed:
        return Finding("old sessions", "ok", f"removed {len(removed)}\n{listed([str(one) for one in removed])}")
    return Finding("old sessions", "ok", "none of mpiruns that were killed")

"""Finds session folders that killed mpirun processes of Open MPI left behind. The name of a folder contains the process id of its
mpirun. It has the form BASE.PID, BASE.HOST.PID or BASE.HOST.PID.UID, depending on the version of PRRTE. A later mpirun with the
same process id fails to start ("The PMIx server's listener thread failed to start")."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mpidp.doctor.findings import CheckResult, listed

OF_MPIRUN = re.compile(rf"(?:ompi|prte)\.(?:(?P<host>.*?)\.)?(?P<pid>\d+)(?:\.{os.getuid()})?")


@dataclass(frozen=True)
class Session:
    """A session folder of this user whose mpirun process no longer runs."""

    host: str
    path: str

    def __str__(self) -> str:
        return f"{self.host}:{self.path}"


def find(host: str, folder: Path | None = None) -> list[Session]:
    """Return the session folders of this user whose mpirun process no longer runs. Folders of other machines are left out.
    `folder`: where to search for session folders (default: the temporary folder). `host`: the name of this machine.
    Independent."""
    found = []
    for path in sorted((folder or Path(tempfile.gettempdir())).iterdir()):
        with suppress(OSError):  # the folder was removed in the meantime
            named = OF_MPIRUN.fullmatch(path.name)
            if named and named["pid"] == str(os.getuid()):  # BASE.HOST.UID, the folder of all sessions of a user
                continue
            own = path.is_dir() and not path.is_symlink() and path.lstat().st_uid == os.getuid()
            here = named and (named["host"] or host).partition(".")[0] == host.partition(".")[0]
            if named and here and own and not Path(f"/proc/{named['pid']}").exists():
                found.append(Session(host, str(path)))
    return found


def clean(sessions: Sequence[Session]) -> list[Session]:
    """Remove session folders, and return the removed ones. A folder is kept if its process id is now that of a running process.
    Independent."""
    removed = []
    for one in sessions:
        path = Path(one.path)
        if one in find(one.host, path.parent):
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                removed.append(one)
    return removed


def check_sessions(sessions: Sequence[Session], removed: Sequence[Session]) -> CheckResult:
    """Report the session folders that killed mpirun processes left. `sessions`: all folders found. `removed`: the removed
    folders. Pure."""
    left = [one for one in sessions if one not in removed]
    if left:
        words = f"session folders that your killed mpirun processes left: {len(left)}\n{listed([str(one) for one in left])}"
        fix = "remove them with --clean; otherwise, an mpirun that gets the process id of a killed mpirun fails to start"
        return CheckResult("old sessions", "note", words, fix)
    if removed:
        return CheckResult("old sessions", "ok", f"removed {len(removed)}\n{listed([str(one) for one in removed])}")
    return CheckResult("old sessions", "ok", "none left by killed mpirun processes")

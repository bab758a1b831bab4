"""Makes a folder that appears only when it is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.cut import ADVICE
from mpidp.errors import UsageError
from mpidp.runtime.files import writing
from mpidp.runtime.work_folder import work_folder


@contextmanager
def new_folder(out: Path) -> Iterator[tuple[Path, Path]]:
    """Return a context that yields two temporary folders (NEW, SCRATCH). At the end, NEW is renamed to `out`. If there is an
    exception, NEW is removed instead. SCRATCH is always removed.

    Raises UsageError if `out` exists or cannot be written, or if another process is writing it. Independent.
    """
    if out.exists():
        raise UsageError(f"{out} exists and is not overwritten: choose another folder, or remove it yourself")
    with work_folder(out) as scratch:
        with writing(out, ADVICE):
            (scratch / "new").mkdir()
        yield scratch / "new", scratch
        with writing(out, ADVICE):
            os.rename(scratch / "new", out)

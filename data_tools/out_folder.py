"""The folder that prepare writes. One process at a time may write it, and old shards stay until the new shards are complete."""

from __future__ import annotations

import math
import os
import shutil
from contextlib import suppress
from pathlib import Path

from data_tools.cut import ADVICE
from mpidp.data.index import Index, read_index
from mpidp.data.special_tokens import FILE
from mpidp.errors import DataError, UsageError
from mpidp.faults.run_lock import RunLock
from mpidp.runtime.files import write_file, writing

LOCK = ".prepare.lock"


class OutFolder:
    """The folder OUT of prepare. Rank 0 opens and closes it. All ranks write to `scratch`."""

    def __init__(self, path: Path) -> None:
        self.path, self.scratch = path, path / ".prepare"
        self._lock: RunLock | None = None
        self._is_new = False

    def names(self) -> set[str]:
        """Return the names of the shards in OUT that a run of prepare wrote, even if the run was killed. Raises UsageError if OUT
        has other shards. Independent."""
        out = self.path
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is not a folder; choose another")
        ours: set[str] = set()
        for name in ("index.json", f"{self.scratch.name}/old.json", f"{self.scratch.name}/new.json"):
            if (out / name).exists():
                try:
                    ours |= {record.name for record in read_index(out, name).files}
                except DataError as error:
                    if name == "index.json":
                        raise UsageError(f"--out {out} holds an index that cannot be replaced safely ({error}). "
                                         "Choose another folder, or remove its files yourself") from None
        if foreign := sorted(path.name for path in out.glob("*.h5") if path.name not in ours):
            more = " and others" if foreign[1:] else ""
            raise UsageError(f"--out {out} holds {foreign[0]}{more}, which no index.json lists. Nothing was changed. "
                             "Choose another folder, or remove these files yourself")
        return {name for name in ours if (out / name).exists()}

    def open(self, wait: bool) -> bool:
        """Lock OUT and make the scratch folder. Return True.

        With `wait`, first wait until no other process prepares OUT. If OUT then has an index, return False, and make no
        scratch folder. Raises UsageError if OUT cannot be written, or has shards that prepare did not write. Without `wait`, also
        raises UsageError if another process prepares OUT. Independent.
        """
        self._is_new = not self.path.exists()
        try:
            self._lock = RunLock(self.path, math.inf if wait else 3.0, name=LOCK, option="out")
            if wait and (self.path / "index.json").exists():
                return False
            ours = self.names()
            with writing(self.path, "choose another --out"):
                if self._is_half_replaced():
                    for name in ours:
                        (self.path / name).unlink()
                shutil.rmtree(self.scratch, ignore_errors=True)  # a killed run left this folder
                self.scratch.mkdir()
        except BaseException:
            self.close()
            raise
        return True

    def put_in_place(self, index: Index, tokenizer: str, special: str) -> None:
        """Replace the old shards and index of OUT by the new ones. `tokenizer`, `special`: the contents of tokenizer.json and
        special_tokens.json ("": no such file). If the process is killed during this call, the next run of prepare deletes the
        old and the new shards. Independent."""
        out, scratch, stale = self.path, self.scratch, self.names() - {record.name for record in index.files}
        with writing(out, ADVICE):
            write_file(scratch / "tokenizer.json", tokenizer)
            if special:
                write_file(scratch / FILE, special)
            write_file(scratch / "index.json", index.to_json())
            write_file(scratch / "new.json", index.to_json())  # from here on, only renames
            if (out / "index.json").exists():
                os.replace(out / "index.json", scratch / "old.json")
            for record in index.files:
                os.replace(scratch / record.name, out / record.name)
            for name in stale:
                (out / name).unlink()
            os.replace(scratch / "tokenizer.json", out / "tokenizer.json")
            if special:
                os.replace(scratch / FILE, out / FILE)
            else:
                (out / FILE).unlink(missing_ok=True)
            os.replace(scratch / "index.json", out / "index.json")
            shutil.rmtree(scratch, ignore_errors=True)  # removed here, before the other ranks continue

    def close(self) -> None:
        """Unlock OUT. Remove the scratch folder, unless put_in_place() was interrupted. Remove OUT if this run created it and
        it is empty. Independent."""
        if self._lock is not None:
            if not self._is_half_replaced():
                shutil.rmtree(self.scratch, ignore_errors=True)
            self._lock.release()
            self._lock = None
        if self._is_new:
            with suppress(OSError):  # succeeds only if OUT is empty
                self.path.rmdir()

    def _is_half_replaced(self) -> bool:
        """Return whether put_in_place() was interrupted while it replaced the shards. If so, old.json and new.json in the
        scratch folder list the shards."""
        return (self.scratch / "new.json").exists() and not (self.path / "index.json").exists()

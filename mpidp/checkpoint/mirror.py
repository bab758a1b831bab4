"""Copies of checkpoints in object storage (run.mirror). A thread of rank 0 copies each checkpoint after its commit.

    ADDRESS/mirror.json                           the id of the run to which the checkpoints belong
    ADDRESS/config.toml, metrics.jsonl, ...       the other files of RUN that belong to the checkpoints
    ADDRESS/checkpoints/step_00000100/...         as in RUN; manifest.json is written last

A checkpoint on the mirror is complete only if its manifest is there. Errors of the thread do not stop training. The thread prints
a warning and continues with the next checkpoint.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from mpidp.checkpoint.manifest import step_of
from mpidp.checkpoint.mirrored import RUN_FILES, MirrorFolder
from mpidp.errors import MpidpError
from mpidp.runtime.files import open_regular
from mpidp.runtime.log import log
from mpidp.storage.address import without_secrets

AGAIN_SECONDS = 5.0  # at the end of the run: pause after an error, before the last checkpoint is copied again


class Mirror:
    """Copies the checkpoints of a run in a thread. Only the main thread of one rank may call the methods. Methods are
    Independent."""

    def __init__(self, run_dir: Path, folder: MirrorFolder, keep: int) -> None:
        """`run_dir`: RUN. `folder`: the mirror. `keep`: the number of checkpoints to keep on the mirror."""
        self._run_dir, self._folder, self._keep = run_dir, folder, keep
        # A checkpoint, and whether to copy it even if the mirror has it
        self._waiting: tuple[Path, bool] | None = None  # the newest valid checkpoint, if its copying has not begun
        self._failed: tuple[Path, bool] | None = None  # the newest valid checkpoint, if it could not be copied
        self._changed = threading.Condition()
        self._busy = self._ending = False
        self._thread = threading.Thread(target=self._run, name="mpidp-mirror", daemon=True)
        self._thread.start()

    def add(self, checkpoint: Path) -> None:
        """Tell the thread to copy `checkpoint` next. If an earlier checkpoint is still waiting, the earlier one is not
        copied."""
        with self._changed:
            self._waiting = (checkpoint, True)
            self._changed.notify_all()

    def resumed_from(self, checkpoint: Path) -> None:
        """Tell the thread to copy `checkpoint`, the newest valid one, if the mirror lacks it. Do nothing if a checkpoint is
        already waiting."""
        with self._changed:
            self._waiting = self._waiting or (checkpoint, False)
            self._changed.notify_all()

    def finish(self, seconds: float) -> bool:
        """Wait until the newest checkpoint is copied, but at most `seconds`. If copying fails, it is repeated. Return whether
        the mirror has the newest checkpoint. Do not call add() after this method."""
        until, told = time.monotonic() + seconds, False
        with self._changed:
            self._ending = True
            while (self._busy or self._waiting or self._failed) and (left := until - time.monotonic()) > 0:
                if not told:
                    log.info("waiting for the last checkpoint to be copied to %s, at most %.0f s", self._folder.address, seconds)
                    told = True
                if self._failed and not self._busy and not self._waiting:
                    self._changed.wait(min(AGAIN_SECONDS, left))
                    self._waiting, self._failed = self._waiting or self._failed, None
                    self._changed.notify_all()
                else:
                    self._changed.wait(left)
            complete = not (self._busy or self._waiting or self._failed)
        self._folder.close()
        if not complete:
            log.warning("warning: the last checkpoint could not be copied to %s in time; it is only in %s",
                        self._folder.address, self._run_dir)
        return complete

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None:
                    self._changed.wait()
                task, self._waiting, self._failed, self._busy = self._waiting, None, None, True
            copied = self._try(*task)
            with self._changed:
                self._busy = False
                self._failed = None if copied or self._waiting else task
                self._changed.notify_all()

    def _try(self, checkpoint: Path, always: bool) -> bool:
        began = time.monotonic()
        try:
            if not always and step_of(checkpoint) in self._folder.steps():
                return True
            size = self._copy(checkpoint)
        except FileNotFoundError as error:
            with self._changed:
                if self._waiting is not None:  # the run has deleted the checkpoint; a newer one is next
                    return True
            reason = str(error)
        except (MpidpError, OSError) as error:
            reason = without_secrets(str(error))
        except Exception as error:  # a bug here must not stop training
            reason = without_secrets(f"{type(error).__name__}: {error}")
        else:
            log.info("%s copied to %s (%.3g MB, %.1f s)", checkpoint.name, self._folder.address, size / 1e6,
                     time.monotonic() - began)
            return True
        log.warning("warning: %s could not be copied to run.mirror (%s). Training continues; the next checkpoint will be copied",
                    checkpoint.name, reason)
        return False

    def _copy(self, checkpoint: Path) -> int:
        """Copy a checkpoint and the other files of the run that belong to it. Return the number of copied bytes.

        All files are opened before the first is copied, because the run may delete the checkpoint meanwhile.
        """
        name, size = f"checkpoints/{checkpoint.name}", 0
        with ExitStack() as stack:
            manifest = stack.enter_context(open_regular(checkpoint / "manifest.json"))
            parts = [path for path in sorted(checkpoint.iterdir()) if path.name != "manifest.json"]
            files = [(f"{name}/{path.name}", stack.enter_context(open_regular(path))) for path in parts]
            files += [(str(path.relative_to(self._run_dir)), stack.enter_context(open_regular(path))) for path in self._of_run()]
            self._folder.delete([f"{name}/manifest.json"])  # this marks an earlier copy as incomplete
            for target, file in [*files, (f"{name}/manifest.json", manifest)]:
                length = os.fstat(file.fileno()).st_size
                self._folder.write(target, file, length)
                size += length
        self._folder.prune(step_of(checkpoint), self._keep)
        return size

    def _of_run(self) -> Iterator[Path]:
        for pattern in RUN_FILES:
            yield from (path for path in sorted(self._run_dir.glob(pattern)) if path.is_file())

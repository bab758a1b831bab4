"""Access to a mirror, the folder with copies of a run's checkpoints (mirror.py). This module lists these checkpoints, finds out
to which run they belong, and fetches the newest checkpoint."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from mpidp.checkpoint.manifest import check_file, committed, read_manifest
from mpidp.errors import CheckpointError, DataError, MpidpError, UsageError
from mpidp.runtime.files import create_file, write_file
from mpidp.runtime.json_file import parse_json
from mpidp.runtime.log import log
from mpidp.storage.opening import open_store
from mpidp.storage.retry import Retries
from mpidp.storage.store import Missing

RUN_FILES = ("config.toml", "tokenizer.json", "special_tokens.json", "init.json", "metrics.jsonl", "hf/*")
RETRY_SECONDS = 60.0  # how long a failing request is repeated; the mirror then continues with the next checkpoint
PIECE = 16 << 20  # bytes fetched at a time
_OURS = re.compile(r"checkpoints/step_(\d{8,})/(manifest\.json|rank_\d{5}\.safetensors)")
_PART = re.compile(r"rank_\d{5}\.safetensors")
MARK = "mirror.json"


class MirrorFolder:
    """The mirror of a run: a folder with copies of the run's checkpoints (run.mirror). `address`: the address of this folder.
    A method repeats a failed request for RETRY_SECONDS, and then raises DataError. Independent."""

    def __init__(self, address: str) -> None:
        self._store = open_store(address, "run.mirror")
        self.address = self._store.address
        self._retries = Retries(RETRY_SECONDS, "run.mirror")

    def close(self) -> None:
        """Stop repeating failed requests. Independent."""
        self._retries.close()

    def names(self) -> list[str]:
        """Return the names of all files that belong to checkpoints. Independent."""
        found = self._retries.call(self.address, lambda: self._store.names("checkpoints"))
        return [name for name in found if _OURS.fullmatch(name)]

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, newest first. Independent."""
        return sorted({_step_of(name) for name in self.names() if name.endswith("/manifest.json")}, reverse=True)

    def write(self, name: str, content: IO[bytes], size: int) -> None:
        """Write the first `size` bytes of the open file `content` to the file `name` of the mirror. Independent."""
        def attempt() -> None:
            content.seek(0)
            self._store.write(name, content, size)

        self._retries.call(self.address / name, attempt)

    def delete(self, names: Iterable[str]) -> None:
        """Delete the files `names` of the mirror. Independent."""
        names = list(names)
        self._retries.call(self.address, lambda: self._store.delete(names))

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` complete checkpoints. Also delete incomplete checkpoints that are older than the
        newest complete one. Independent."""
        names = self.names()
        complete = sorted({_step_of(name) for name in names if name.endswith("/manifest.json")})
        old = [name for name in names if complete and _step_of(name) < complete[-1] and _step_of(name) not in complete[-keep:]]
        if old:
            self.delete(sorted(old, key=lambda name: not name.endswith("/manifest.json")))

    def read(self, name: str) -> bytes | None:
        """Return the whole content of the file `name`, or None if the file does not exist. Use fetch() for large files.
        Independent."""
        where = self.address / name
        try:
            version = self._retries.call(where, lambda: self._store.version(name))
            return self._retries.call(where, lambda: self._store.read(name, 0, version.size, version)) if version.size else b""
        except Missing:
            return None

    def fetch(self, name: str, target: Path) -> None:
        """Copy the file `name` to the path `target`. Raises CheckpointError if the file is not on the mirror. Independent."""
        where = self.address / name
        try:
            version = self._retries.call(where, lambda: self._store.version(name))
        except Missing:
            raise CheckpointError(f"{where} is missing") from None
        with create_file(target) as file:
            for at in range(0, version.size, PIECE):
                end = min(at + PIECE, version.size)
                file.write(self._retries.call(
                    where, lambda at=at, end=end: self._store.read(name, at, end, version)  # type: ignore[misc]
                ))


def _step_of(name: str) -> int:
    return int(name.split("/")[1].removeprefix("step_"))


def open_mirror_folder(run_dir: Path, address: str, resume: str) -> MirrorFolder:
    """Open the mirror of a run. If RUN has no checkpoint, fetch the newest valid checkpoint of the mirror. `resume`: the value of
    run.resume.

    Raises UsageError if the mirror belongs to another run or has a newer checkpoint than RUN. Raises CheckpointError if a
    checkpoint must be fetched but none is valid. Raises DataError if the server fails, unless RUN has checkpoints and already
    belongs to a mirror. In that case, logs a warning instead. Independent.
    """
    folder = MirrorFolder(address)
    local = [int(path.name.rpartition("_")[2]) for path in committed(run_dir / "checkpoints")]
    own = _own_id(run_dir)
    try:
        theirs = _id_of(folder)
        if theirs is None:
            own = secrets.token_hex(8) if own is None or resume == "never" else own
            content = json.dumps({"run": own}).encode() + b"\n"
            write_file(run_dir / MARK, content)
            with open(run_dir / MARK, "rb") as file:
                folder.write(MARK, file, len(content))
            return folder
        if resume == "never" or local and theirs != own:
            whose = "the earlier run, and run.resume=never starts a new run" if theirs == own else "another run"
            raise UsageError(f"run.mirror={address} holds the checkpoints of {whose}. Choose another address")
        steps = folder.steps()
        if local and steps and max(steps) > max(local):
            raise UsageError(
                f"run.mirror={address} has a checkpoint of step {max(steps)}, but "
                f"step {max(local)} is the newest in {run_dir}. To resume from the mirror, move {run_dir / 'checkpoints'} away. "
                f"To resume from step {max(local)}, choose another run.mirror"
            )
        if not local and steps:
            _fetch_newest(folder, steps, run_dir)
        write_file(run_dir / MARK, json.dumps({"run": theirs}) + "\n")
    except DataError as error:
        if not local or own is None:
            raise
        log.warning("warning: run.mirror cannot be used now (%s). Training continues, and the next checkpoint will be "
                    "copied", error)
    return folder


def settings_on(address: str) -> dict[str, Any]:
    """Return the content of config.toml on the mirror at `address`, as {section: {key: value}}. Return {} if the mirror has no
    complete checkpoint. Raises CheckpointError if the file is damaged, and DataError if the server fails. Independent."""
    folder = MirrorFolder(address)
    content = folder.read("config.toml") if folder.steps() else None
    try:
        return tomllib.loads((content or b"").decode())
    except ValueError as error:
        raise CheckpointError(f"{folder.address}/config.toml is damaged: {error}") from error


def _own_id(run_dir: Path) -> str | None:
    with suppress(OSError, ValueError):
        return str(parse_json((run_dir / MARK).read_bytes(), dict[str, str])["run"])
    return None


def _id_of(folder: MirrorFolder) -> str | None:
    """Return the id of the run to which the mirror belongs, or None if the mirror is new. Raises UsageError if the mirror has
    checkpoints but no id."""
    content = folder.read(MARK)
    if content is None:
        if folder.names():
            raise UsageError(f"run.mirror={folder.address} has checkpoints, but no file {MARK} that says to which run "
                             "they belong. Choose another address")
        return None
    try:
        return str(parse_json(content, dict[str, str])["run"])
    except (ValueError, KeyError):
        raise UsageError(f"{folder.address / MARK} is not a file that mpidp wrote. Choose another run.mirror") from None


def _fetch_newest(folder: MirrorFolder, steps: list[int], run_dir: Path) -> None:
    """Copy the newest valid checkpoint of the mirror to RUN. If RUN has no metrics.jsonl, copy this file too. `steps`: the steps
    of the checkpoints, newest first. Raises CheckpointError if none is valid."""
    reasons = []
    for step in steps:
        name = f"step_{step:08d}"
        temporary = run_dir / "checkpoints" / f".writing_{name}_{secrets.token_hex(4)}"
        log.info("%s has no checkpoint: fetching the checkpoint of step %d from %s", run_dir, step, folder.address)
        try:
            temporary.mkdir(parents=True)
            folder.fetch(f"checkpoints/{name}/manifest.json", temporary / "manifest.json")
            for record in read_manifest(temporary)["files"]:
                if not _PART.fullmatch(str(record["file"])):
                    raise CheckpointError(f"the manifest of step {step} lists {record['file']!r}, which is not a checkpoint file")
                folder.fetch(f"checkpoints/{name}/{record['file']}", temporary / record["file"])
                check_file(temporary, record)
            _fetch_run_files(folder, run_dir)
            os.rename(temporary, run_dir / "checkpoints" / name)
            write_file(run_dir / "latest", name)
            return
        except CheckpointError as error:
            log.warning("skipped an invalid checkpoint of %s: %s", folder.address, error)
            reasons.append(str(error))
        except OSError as error:
            raise MpidpError(
                f"the checkpoint of step {step} could not be written to {run_dir} ({error}). Free some space, or use another "
                "--run.dir"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    raise CheckpointError(f"no checkpoint on {folder.address} is valid ({'; '.join(reasons)}). Choose another run.mirror to "
                          "start a new run")


def _fetch_run_files(folder: MirrorFolder, run_dir: Path) -> None:
    """Copy metrics.jsonl to RUN if RUN does not have it. The other files of a run are written again when the run starts."""
    if not (run_dir / "metrics.jsonl").exists():
        with suppress(CheckpointError):
            folder.fetch("metrics.jsonl", run_dir / "metrics.jsonl")

"""Finds the checkpoint from which a run resumes, and rejects changed settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from mpidp.checkpoint import manifest
from mpidp.checkpoint.manifest import check_file, newest_valid, readable
from mpidp.checkpoint.mirrored import RUN_FILES
from mpidp.checkpoint.reader import Reader
from mpidp.config.schema import Config, fields_of
from mpidp.config.settings import FIXED
from mpidp.errors import CheckpointError, UsageError
from mpidp.model.products import KIND
from mpidp.runtime.log import log
from mpidp.runtime.world import raise_together


def open_run(path: Path, comm: MPI.Intracomm) -> Reader:
    """Open a checkpoint. `path`: the folder of a checkpoint or of a run. In the folder of a run, the newest valid checkpoint
    is opened. Raises CheckpointError if there is no valid checkpoint. Collective over comm."""
    with raise_together(comm):
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder")
    if (path / "manifest.json").exists():
        with raise_together(comm), readable(path):
            reader = Reader(path)
            for record in reader.meta["files"][comm.rank :: comm.size]:
                check_file(path, record)
        return reader
    found, skipped = newest_valid(path, comm)
    for reason in skipped if comm.rank == 0 else ():
        log.warning("skipped an invalid checkpoint: %s", reason)
    with raise_together(comm):
        if found is None and (path / "config.json").exists():
            raise CheckpointError(f"{path} is a Hugging Face folder; give the folder of a run")
        if found is None:
            raise CheckpointError(f"{path} contains no checkpoint. Train first, with --run.dir={path}")
        return Reader(found)


def changed_base_message(path: Path | str, found: str, wanted: str) -> str:
    """Return the error message for weights in `path` that are not those from which a run started. `found`: the sha256 of the
    weights. `wanted`: the sha256 of the weights from which the run started. Pure."""
    return (
        f"the weights in {path} are not those from which the run started: they have changed, or belong to another model "
        f"(weights_sha256 is {found}, but must be {wanted}). Give the original weights. A LoRA run does not store its base "
        "model, so do not train or modify the base model"
    )


def same_path(one: str, other: str) -> bool:
    """Return whether two paths name the same folder. Examples are base, ./base and the absolute path of base. Independent."""
    return one == other or bool(one and other) and os.path.realpath(one) == os.path.realpath(other)


def fingerprint(config: Config, device: torch.device) -> dict[str, Any]:
    """Return the numerics fingerprint of this run: the settings, versions and hardware that affect the bits of its results.
    Each checkpoint stores the fingerprint. If it differs when a run resumes, the differences are logged. Independent."""
    return {
        "threads": config.train.threads,
        "micro_batch": config.train.micro_batch,
        "dtype": config.train.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "compile": config.train.compile,
        "deterministic": config.train.deterministic,
        "reducer": config.comm.reducer,
        "tp": config.mesh.tp if config.model.slices == 1 else f"divides {config.model.slices} slices",
        "sequence": config.mesh.sequence and config.model.slices == 1,
        "stages of tied embeddings": config.mesh.pp if config.model.tie_embeddings and config.model.slices == 1 else 1,
        "compress": config.comm.compress,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "blas": os.environ.get("MKL_CBWR", ""),
        "products": KIND if device.type == "cpu" else "torch",
    }


def set_aside(run_dir: Path) -> Path | None:
    """Move the files of an earlier run in RUN to RUN/previous_N. Return the path of this folder, or None if RUN has no files
    of an earlier run. Independent."""
    own = "checkpoints", "latest", "tries.json", "timeline.json", "tensorboard", "track"
    names = [name for one in (*RUN_FILES, *own) if (run_dir / (name := one.removesuffix("/**/*"))).exists()]
    if not names:
        return None
    number = 1
    while (run_dir / f"previous_{number}").exists():
        number += 1
    aside = run_dir / f"previous_{number}"
    aside.mkdir()
    for name in names:
        os.rename(run_dir / name, aside / name)
    return aside


def find_checkpoint(run_dir: Path, resume: str, comm: MPI.Intracomm) -> tuple[Reader | None, list[str]]:
    """Return (reader, messages). reader: the checkpoint that `resume` selects, or None if a new run starts. messages: lines for
    the user. Collective over comm.

    `resume`: the value of run.resume. "auto" selects the newest valid checkpoint, or None if there are no checkpoints. "must"
    does the same, but raises CheckpointError if there are no checkpoints. "never" selects None, and moves the files of an earlier
    run to RUN/previous_N. Raises CheckpointError if there are checkpoints but none is valid.
    """
    notes: list[str] = []
    if resume == "never":
        aside: Path | None = None
        with raise_together(comm):
            if comm.rank == 0:
                aside = set_aside(run_dir)
        if aside is not None:
            notes.append(f"run.resume=never: the earlier run was moved to {aside}")
        return None, notes
    path, skipped = manifest.newest_valid(run_dir, comm)
    notes += [f"skipped an invalid checkpoint: {reason}" for reason in skipped]
    if path is None:
        if resume == "must":
            raise CheckpointError.on_every_rank(
                f"run.resume=must, but {run_dir / 'checkpoints'} contains no checkpoint; use run.resume=auto to start a new run"
            )
        return None, notes
    return Reader(path), notes


def reject_changed_settings(saved: Mapping[str, Any], config: Config, checked_base: bool = False) -> None:
    """Raise UsageError if a setting has changed that must stay the same when a run resumes. `saved`: the settings in the
    checkpoint, as {section.key: value}. `checked_base`: whether train.init_from may change because the caller compares the hashes
    of the weights. Independent."""
    changed = [
        f"{key} was {saved[key]!r} and is now {value!r}"
        for key, about, value in fields_of(config)
        if about.metadata["resume"] == FIXED and key in saved and saved[key] != value
        and not (key == "train.init_from" and (checked_base or same_path(str(saved[key]), value)))
    ]
    if changed:
        raise UsageError(
            f"{config.run.dir} contains a checkpoint of a run with other settings: {'; '.join(changed)}. Use the old values to "
            "resume, another --run.dir for a new run, or --run.resume=never to move the old run to previous_N and start a new one"
        )

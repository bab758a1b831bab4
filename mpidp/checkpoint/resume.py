"""Which checkpoint a run resumes from, and what may not change when it does."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from mpidp.checkpoint import manifest
from mpidp.checkpoint.manifest import check_file, newest_valid, readable
from mpidp.checkpoint.reader import Reader
from mpidp.config.schema import Config, fields_of
from mpidp.config.settings import FIXED
from mpidp.errors import CheckpointError, UsageError
from mpidp.runtime.world import raise_together


def open_run(path: Path, comm: MPI.Intracomm) -> Reader:
    """Open the newest valid checkpoint of a run's folder, or the checkpoint in `path` itself. CheckpointError. Collective over
    comm."""
    with raise_together(comm):
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder")
    if (path / "manifest.json").exists():
        with raise_together(comm), readable(path):
            reader = Reader(path)
            for record in reader.meta["files"][comm.rank :: comm.size]:
                check_file(path, record)
        return reader
    found, passed_over = newest_valid(path, comm)
    for reason in passed_over if comm.rank == 0 else ():
        print(f"skipped an invalid checkpoint: {reason}", file=sys.stderr)
    with raise_together(comm):
        if found is None:
            raise CheckpointError(f"{path} contains no checkpoint: train first, with --run.dir={path}")
        return Reader(found)


def changed_base_message(path: Path | str, found: str, wanted: str) -> str:
    """Return the error message for a base model that changed after LoRA adapters were trained on it. Pure."""
    return (
        f"the weights in {path} have changed: the adapters were trained on weights_sha256 {wanted}, found {found}. Restore the "
        "original weights. A LoRA run does not store its base model, so do not train or modify the base model"
    )


def fingerprint(config: Config, device: torch.device) -> dict[str, Any]:
    """What the bits depend on besides data and settings: kept in every checkpoint, a change is said in one line. Independent."""
    return {
        "threads": config.train.threads,
        "dtype": config.train.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "compile": config.train.compile,
        "deterministic": config.train.deterministic,
        "reducer": config.comm.reducer,
        "tp": config.mesh.tp,
        "sequence": config.mesh.sequence,
        "stages of tied embeddings": config.mesh.pp if config.model.tie_embeddings else 1,
        "compress": config.comm.compress,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "blas": os.environ.get("MKL_CBWR", ""),
    }


def set_aside(run_dir: Path) -> Path | None:
    """Move an earlier run's files into RUN/previous_N, so that resume=never loses nothing. Independent."""
    names = ["checkpoints", "latest", "metrics.jsonl", "config.toml", "tries.json", "timeline.json", "tensorboard"]
    names = [n for n in names if (run_dir / n).exists()]
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
    """What `run.resume` says to start from, and what to tell the user. Collective over comm.

    auto: the newest valid checkpoint, else the beginning. must: CheckpointError when there is none. never: the beginning;
    an earlier run's files are set aside.
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
    path, passed_over = manifest.newest_valid(run_dir, comm)
    notes += [f"passed over an invalid checkpoint: {reason}" for reason in passed_over]
    if path is None:
        if resume == "must":
            raise CheckpointError.on_every_rank(
                f"run.resume=must, but {run_dir / 'checkpoints'} holds no checkpoint; use auto to begin"
            )
        return None, notes
    return Reader(path), notes


def reject_changed_settings(saved: Mapping[str, Any], config: Config) -> None:
    """UsageError naming every setting that must stay as it was and did not. saved: {section.key: value}. Independent."""
    changed = [
        f"{key} was {saved[key]!r}, is {value!r}"
        for key, about, value in fields_of(config)
        if about.metadata["resume"] == FIXED and key in saved and saved[key] != value
    ]
    if changed:
        raise UsageError(
            f"{config.run.dir} holds a checkpoint of another run: {'; '.join(changed)}. Give the old values to go on, another "
            "--run.dir to begin beside it, or --run.resume=never to set it aside"
        )

"""A trained model from a run's folder: what evaluate and generate begin with."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from mpidp import resolve
from mpidp.checkpoint import Reader, check_file, newest_valid, readable
from mpidp.comm.mesh import Mesh, together
from mpidp.errors import CheckpointError
from mpidp.model.shape import TransformerShape
from mpidp.model.transformer import MODELS


@dataclass
class Loaded:
    """A model on its device, and the precision of its matrix products."""

    model: Any
    device: torch.device
    dtype: torch.dtype


def open_run(path: Path, comm: MPI.Intracomm) -> Reader:
    """The newest valid checkpoint of RUN, or the checkpoint whose folder `path` is. CheckpointError. Collective over comm."""
    with together(comm):
        if not path.is_dir():
            raise CheckpointError(f"{path}: there is no such run")
    if (path / "manifest.json").exists():
        with together(comm), readable(path):
            reader = Reader(path)
            for record in reader.meta["files"][comm.rank :: comm.size]:
                check_file(path, record)
        return reader
    found, passed_over = newest_valid(path, comm)
    for reason in passed_over if comm.rank == 0 else ():
        print(f"passed over an invalid checkpoint: {reason}", file=sys.stderr)
    with together(comm):
        if found is None:
            raise CheckpointError(f"{path} holds no checkpoint: train first, with --run.dir={path}")
        return Reader(found)


def load_model(reader: Reader, mesh: Mesh, device: str, threads: int, comm: MPI.Intracomm) -> Loaded:
    """The checkpoint's model, ready to run. CheckpointError. Independent."""
    where = resolve.resolve_device(device, mesh)
    with readable(reader.path), torch.no_grad():
        torch.set_num_threads(threads or reader.meta["fingerprint"]["threads"])
        shape = TransformerShape(**reader.meta["shape"])
        model = MODELS[reader.meta["config"]["model.kind"]](shape).to(where)
        for name, p in model.named_parameters():
            p.copy_(reader[f"model/{name}"].view(p.shape))
        dtype = torch.float32 if where.type == "cpu" else getattr(torch, reader.meta["config"]["train.dtype"])
    return Loaded(model.eval(), where, dtype)

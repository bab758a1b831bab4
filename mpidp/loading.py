"""A trained model from a run's folder: what evaluate and generate begin with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp import resolve
from mpidp.checkpoint import Reader, check_file, newest_valid, readable
from mpidp.comm.grid import Grid
from mpidp.comm.mesh import together
from mpidp.comm.parallel_layers import Ring, loss_over, share_layers
from mpidp.comm.stages import FORWARD, Stages
from mpidp.comm.transport import Messages
from mpidp.errors import CheckpointError
from mpidp.model.kinds import make_model, saved_shape
from mpidp.model.part import refuse
from mpidp.parts import Parts


@dataclass
class Loaded:
    """A model on its device, or this rank's part of one, and the precision of its matrix products."""

    model: Any
    device: torch.device
    dtype: torch.dtype
    grid: Grid
    stages: Stages | None = None  # this rank's place in a pipeline
    losses: Callable[[Tensor, Tensor], Tensor] | None = None  # from logits of a part of the vocabulary

    @torch.no_grad()
    def last_logits(self, window: Tensor) -> Tensor:
        """Of the token after a window (1, T): (V,) float32 on the CPU, the same on all ranks of a replica. Collective over
        grid.model."""
        stages, tp = self.stages, self.grid.tp
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            entered = window if stages is None or stages.first else stages.receive(
                FORWARD, 0, (*window.shape, self.model.shape.model_dim)
            )
            left = self.model(entered)
        found = np.zeros(self.model.shape.vocab_size, dtype=np.float32)
        if stages is None or stages.last:
            mine = self.model.part.share(len(found))
            found[mine.start : mine.stop] = left[0, -1].float().cpu().numpy()
            if tp.size > 1:
                tp.Allreduce(MPI.IN_PLACE, found)  # each entry has one writer
        else:
            stages.send(FORWARD, 0, left)
        if stages is not None:
            stages.settle([])
            self.grid.pp.Bcast(found, root=stages.count - 1)
        return torch.from_numpy(found)


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


def load_model(reader: Reader, grid: Grid, device: str, threads: int) -> Loaded:
    """The checkpoint's model, or this rank's part of it, ready to run. CheckpointError, UsageError. Independent."""
    where = resolve.resolve_device(device, grid.everyone)
    with readable(reader.path), torch.no_grad():
        torch.set_num_threads(threads or reader.meta["fingerprint"]["threads"])
        shape = saved_shape(reader.meta["config"]["model.kind"], reader.meta["shape"])
        refuse(shape, grid.tp.size, grid.pp.size)
        parts = Parts(grid, shape)
        model = make_model(shape, part=parts.part).to(where)
        parts.load(reader, model)
        dtype = torch.float32 if where.type == "cpu" else getattr(torch, reader.meta["config"]["train.dtype"])
    wire, loaded = Messages(where, "host" if where.type == "cpu" else "staged"), Loaded(model.eval(), where, dtype, grid)
    if grid.tp.size > 1:
        ring = Ring(grid, wire)
        share_layers(model, ring)
        loaded.losses = loss_over(ring, parts.part.share(shape.vocab_size).start)
    if grid.pp.size > 1:
        loaded.stages = Stages(grid, wire, where)
    return loaded

"""A trained model from a run's folder: what evaluate and generate begin with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.checkpoint.manifest import committed, readable
from mpidp.checkpoint.reader import Reader
from mpidp.checkpoint.resume import open_run, others_there
from mpidp.comm.transport import Messages
from mpidp.data.tokenizer import Tokenizer, load_tokenizer
from mpidp.errors import DataError, UsageError
from mpidp.hf.folder import Folder
from mpidp.model.kinds import saved_shape
from mpidp.model.part import refuse
from mpidp.model.starting import base_weights, prepared
from mpidp.parallel.grid import Grid, make_grid
from mpidp.parallel.model_part import Parts
from mpidp.parallel.pipeline import FORWARD, Stages
from mpidp.parallel.tensor import loss_over, share_layers
from mpidp.parallel.tensor_comm import Ring
from mpidp.runtime.device import resolve_device
from mpidp.runtime.world import together


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
    def through(self, tokens: Tensor, caches: list[Any] | None = None) -> Tensor | None:
        """What the model makes of tokens (B, T) that go on from what its caches hold: logits (B, T, V of this rank) where the
        last layer is, None on other stages. Collective over grid.model."""
        stages, tokens = self.stages, tokens.to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            entered = tokens if stages is None or stages.first else stages.receive(
                FORWARD, 0, (*tokens.shape, self.model.shape.model_dim)
            )
            left: Tensor = self.model(entered) if caches is None else self.model(entered, caches=caches)
        if stages is None or stages.last:
            return left
        stages.send(FORWARD, 0, left)
        return None

    def last_logits(self, tokens: Tensor, caches: list[Any] | None = None) -> Tensor:
        """Of the token after tokens (B, T): (B, V) float32 on the CPU, the same on all ranks of a replica. Collective over
        grid.model."""
        logits, tp = self.through(tokens, caches), self.grid.tp
        found = np.zeros((len(tokens), self.model.shape.vocab_size), dtype=np.float32)
        if logits is not None:
            mine = self.model.part.share(found.shape[1])
            found[:, mine.start : mine.stop] = logits[:, -1].float().cpu().numpy()
            if tp.size > 1:
                tp.Allreduce(MPI.IN_PLACE, found)  # each entry has one writer
        if self.stages is not None:
            self.stages.settle([])
            self.grid.pp.Bcast(found, root=self.stages.count - 1)
        return torch.from_numpy(found)


def load_tokenizer_for(loaded: Loaded, reader: Reader, data: str | None) -> Tokenizer:
    """The run's own, or that of a folder of shards or a tokenizer.json; its BOS counts for a model that began with weights that
    were there, since no other has ever seen it. DataError when missing or of another size. Independent."""
    tokenizer = load_tokenizer(data or reader.path.parent.parent, reader.meta["eod"])
    rows, padded = loaded.model.shape.vocab_size, reader.meta["config"].get("model.vocab_size", 0) > 0
    if tokenizer.vocab_size > rows or (tokenizer.vocab_size < rows and not padded):
        raise DataError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}: give --data")
    if "init_from" not in reader.meta:
        tokenizer.bos = None
    return tokenizer


def open_model(options: Any, world: MPI.Intracomm) -> tuple[Reader, Loaded, Tokenizer]:
    """RUN's newest checkpoint, its model or this rank's part of it, and its tokenizer, as a command's options (run, data, tp, pp,
    device, threads) name them. UsageError, DataError, CheckpointError. Collective over world."""
    grid = make_grid(world, options.tp, options.pp)
    reader = open_run(Path(options.run), world)
    with together(world):
        loaded = load_model(reader, grid, options.device, options.threads)
        return reader, loaded, load_tokenizer_for(loaded, reader, options.data)


def weights_at(path: Path) -> Reader | Folder:
    """Those of a run's newest checkpoint, of one checkpoint, or of a Hugging Face folder. DataError. Independent."""
    if (path / "config.json").is_file():
        return Folder(path)
    found = [path] if (path / "manifest.json").exists() else committed(path / "checkpoints")
    if not found:
        raise DataError(f"{path} is neither a run nor a Hugging Face folder now: put back what was there "
                        "(a relative path is seen from where the command starts)")
    return Reader(found[0])


def load_base(reader: Reader, parts: Parts, model: Any) -> None:
    """What a run's adapters lie on, where it began with weights that were there (train.init_from); a checkpoint of adapters has
    no copy of it. DataError when they are gone or others by now. Independent, of a model that is not cut."""
    if "init_from" not in reader.meta:
        return
    path, wanted = Path(reader.meta["init_from"]["path"]), reader.meta["init_from"]["weights_sha256"]
    with readable(path):
        parts.load(weights_at(path), model)
    if (found := parts.sha256(model)) != wanted:
        raise DataError(others_there(path, found, wanted))


def load_model(reader: Reader, grid: Grid, device: str, threads: int) -> Loaded:
    """The checkpoint's model, or this rank's part of it, ready to run. CheckpointError, UsageError. Independent."""
    where = resolve_device(device, grid.everyone)
    with readable(reader.path), torch.no_grad():
        torch.set_num_threads(threads or reader.meta["fingerprint"]["threads"])
        shape = saved_shape(reader.meta["config"]["model.kind"], reader.meta["shape"])
        refuse(shape, grid.tp.size, grid.pp.size)
        parts = Parts(grid, shape)
        settings = reader.meta["config"]
        model = base_weights(settings, shape, parts.part)
        if settings.get("model.lora_rank", 0):
            if grid.parts > 1:
                raise UsageError(f"{reader.path} holds adapters, which are not cut: leave --tp and --pp out")
            load_base(reader, parts, model)
        model = prepared(model, settings, shape, parts.part).to(where)
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

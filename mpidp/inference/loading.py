"""Load a trained model from a run's folder, for evaluate and generate."""

from __future__ import annotations

import hashlib
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
from mpidp.checkpoint.resume import changed_base_message, open_run
from mpidp.comm.transport import Messages
from mpidp.data.shards import TokenStream
from mpidp.data.tokenizer import Tokenizer, load_tokenizer
from mpidp.errors import DataError, UsageError
from mpidp.hf.folder import ModelFolder
from mpidp.hf.tokens import same
from mpidp.inference.plausible import MAX_THREADS, check_settings, check_shape
from mpidp.model.kinds import saved_shape
from mpidp.model.part import check_split
from mpidp.model.starting import base_weights, prepared
from mpidp.parallel.grid import Grid, make_grid
from mpidp.parallel.model_part import ModelPartition
from mpidp.parallel.pipeline import FORWARD, Stages
from mpidp.parallel.tensor import loss_over, share_layers
from mpidp.parallel.tensor_comm import TensorComm
from mpidp.runtime.device import resolve_device
from mpidp.runtime.world import raise_together


@dataclass
class Loaded:
    """A model, or this rank's part of it, on its device. dtype: the dtype of matrix products."""

    model: Any
    device: torch.device
    dtype: torch.dtype
    grid: Grid
    stages: Stages | None = None  # this rank's place in a pipeline
    losses: Callable[[Tensor, Tensor], Tensor] | None = None  # computes losses from this rank's logits; None: plain_losses
    name: str = "the model"  # the path of its checkpoint, for error messages

    def diverged(self, what: str) -> DataError:
        """Return the error for results that are nan or infinite, to be raised on every rank of a replica. Independent."""
        return DataError.on_every_rank(
            f"{self.name}: the {what} is not finite (nan or inf). The training has probably diverged: use an earlier checkpoint, "
            "or train again with a lower optim.lr"
        )

    @torch.no_grad()
    def forward(self, tokens: Tensor, caches: list[Any] | None = None) -> Tensor | None:
        """Run the model on tokens (B, T), which continue the sequences in the caches.

        Returns logits (B, T, V of this rank) on the last pipeline stage, None on other stages. Collective over grid.model.
        """
        stages, tokens = self.stages, tokens.to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            inputs = tokens if stages is None or stages.first else stages.receive(
                FORWARD, 0, (*tokens.shape, self.model.shape.model_dim)
            )
            outputs: Tensor = self.model(inputs) if caches is None else self.model(inputs, caches=caches)
        if stages is None or stages.last:
            return outputs
        stages.send(FORWARD, 0, outputs)
        return None

    def last_logits(self, tokens: Tensor, caches: list[Any] | None = None) -> Tensor:
        """Return the next token's logits after tokens (B, T): (B, V) float32 on the CPU, the same on all ranks of a replica.

        Collective over grid.model.
        """
        logits, tp = self.forward(tokens, caches), self.grid.tp
        found = np.zeros((len(tokens), self.model.shape.vocab_size), dtype=np.float32)
        if logits is not None:
            columns = self.model.part.own_range(found.shape[1])
            found[:, columns.start : columns.stop] = logits[:, -1].float().cpu().numpy()
            if tp.size > 1:
                tp.Allreduce(MPI.IN_PLACE, found)  # exact: each entry is nonzero on one rank only
        if self.stages is not None:
            self.stages.drain([])
            self.grid.pp.Bcast(found, root=self.stages.count - 1)
        return torch.from_numpy(found)


def own_tokenizer(reader: Reader) -> Path:
    """Return the path of the run's copy of its tokenizer.

    Raises DataError if the file is missing, or is not the tokenizer with which the model was trained. Independent.
    """
    path, restore = reader.path.parent.parent / "tokenizer.json", "restore it from the shards, or give --tokenizer"
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}; {restore}") from None
    if found != reader.meta["tokenizer"]:
        raise DataError(f"{path} has changed since the model was trained, so its ids may mean other text; {restore}")
    return path


def check_same_tokenizer(reader: Reader, stream: TokenStream) -> None:
    """Raise DataError unless the shards were prepared with the run's tokenizer, however its file is formatted. Independent."""
    if stream.tokenizer_sha256 == reader.meta["tokenizer"]:
        return
    if not same(own_tokenizer(reader), stream.index.tokenizer_bytes(stream.path)):
        raise DataError(f"{stream.path} was prepared with another tokenizer than {reader.path}, so its ids mean other text: "
                        f"prepare the text again with --tokenizer {reader.path.parent.parent / 'tokenizer.json'}")


def load_tokenizer_for(loaded: Loaded, reader: Reader, path: str | None) -> Tokenizer:
    """Load the run's tokenizer, or the one at `path`: a tokenizer.json, or a folder that contains one.

    The tokenizer's BOS token is used only for fine-tuned models (train.init_from), because other models were trained without one.
    Raises DataError if the tokenizer is missing, has changed, or its size does not match the model. Independent.
    """
    with readable(reader.path):
        tokenizer = load_tokenizer(path or own_tokenizer(reader), reader.meta["eod"])
        rows, padded = loaded.model.shape.vocab_size, reader.meta["config"].get("model.vocab_size", 0) > 0
    if tokenizer.vocab_size > rows or (tokenizer.vocab_size < rows and not padded):
        raise DataError(f"the tokenizer has {tokenizer.vocab_size} tokens, but the model has {rows}: give another --tokenizer")
    if "init_from" not in reader.meta:
        tokenizer.bos = None
    return tokenizer


def open_model(options: Any, world: MPI.Intracomm) -> tuple[Reader, Loaded, Tokenizer]:
    """Open a run's newest checkpoint, its model (this rank's part) and its tokenizer.

    options: the parsed options run, tokenizer, tp, pp, device and threads. Raises CheckpointError or DataError if a file is
    missing or damaged, and UsageError if an option does not suit the model. Collective over world.
    """
    grid = make_grid(world, options.tp, options.pp)
    reader = open_run(Path(options.run), world)
    with raise_together(world):
        loaded = load_model(reader, grid, options.device, options.threads, options.model_kind, options.base)
        return reader, loaded, load_tokenizer_for(loaded, reader, options.tokenizer)


def weights_at(path: Path) -> Reader | ModelFolder:
    """Open the weights of a run's newest checkpoint, of one checkpoint, or of a Hugging Face folder. Independent.

    Raises DataError if `path` is none of these.
    """
    if (path / "config.json").is_file():
        return ModelFolder(path)
    found = [path] if (path / "manifest.json").exists() else committed(path / "checkpoints")
    if not found:
        raise DataError(f"{path} is neither a run nor a Hugging Face folder: restore the model that the run was fine-tuned from "
                        "(a relative path is relative to the current directory), or give its new place with --base DIR")
    return Reader(found[0])


def base_model(reader: Reader, parts: ModelPartition, moved: str = "") -> Any:
    """Return the base model of a LoRA run, which its checkpoints do not contain: train.init_from, or weights from the seed.

    moved: where train.init_from is now; "": where it was. Raises DataError if it is missing, has another shape or has changed.
    Does not support parts of models. Independent.
    """
    settings = reader.meta["config"]
    if "init_from" not in reader.meta:
        return base_weights(settings, parts.shape, parts.part)
    path, wanted = Path(moved or reader.meta["init_from"]["path"]), reader.meta["init_from"]["weights_sha256"]
    with readable(path):
        weights = weights_at(path)
        if isinstance(weights, Reader):
            check_shape(path, weights.meta, parts.shape)
        elif weights.sizes != parts.sizes:  # before memory for these sizes is used
            raise DataError(f"{path} is another model than the one that {reader.path} was trained on: its tensors differ in size")
        model = base_weights(settings, parts.shape, parts.part)
        parts.load(weights, model)
    if (found := parts.sha256(model)) != wanted:
        raise DataError(changed_base_message(path, found, wanted))
    return model


def load_model(reader: Reader, grid: Grid, device: str, threads: int, kind: str = "", base: str = "") -> Loaded:
    """Load the checkpoint's model (this rank's part), ready for inference. Independent.

    kind: model.kind as the user named it, which a run with a custom model needs; base: where the base of a LoRA run is now, ""
    if it has not moved. Raises CheckpointError if the checkpoint is
    damaged, and UsageError if the grid, the device or the kind is not possible.
    """
    if not 0 <= threads <= MAX_THREADS:
        raise UsageError(f"--threads {threads}: must be in 0..{MAX_THREADS}; 0 means: as in training")
    where = resolve_device(device, grid.everyone)
    with readable(reader.path), torch.no_grad():
        check_settings(reader.path, reader.meta)
        torch.set_num_threads(threads or reader.meta["fingerprint"]["threads"])
        shape = saved_shape(reader.meta["config"]["model.kind"], reader.meta["shape"], kind, reader.path)
        check_shape(reader.path, reader.meta, shape)
        check_split(shape, grid.tp.size, grid.pp.size)
        parts = ModelPartition(grid, shape)
        settings = reader.meta["config"]
        if base and not (settings.get("model.lora_rank", 0) and "init_from" in reader.meta):
            raise UsageError(f"--base {base}: {reader.path} contains all weights; only LoRA adapters on existing weights need it")
        has_adapters = settings.get("model.lora_rank", 0)
        if has_adapters and grid.parts > 1:
            raise UsageError(f"{reader.path} contains LoRA adapters, which do not support --tp and --pp: omit these options")
        model = base_model(reader, parts, base) if has_adapters else base_weights(settings, shape, parts.part)
        model = prepared(model, settings, shape, parts.part).to(where)
        parts.load(reader, model)
        dtype = torch.float32 if where.type == "cpu" else getattr(torch, reader.meta["config"]["train.dtype"])
    wire, loaded = Messages(where, "host" if where.type == "cpu" else "staged"), Loaded(
        model.eval(), where, dtype, grid, name=str(reader.path)
    )
    if grid.tp.size > 1:
        tensor_comm = TensorComm(grid, wire)
        share_layers(model, tensor_comm)
        loaded.losses = loss_over(tensor_comm, parts.part.own_range(shape.vocab_size).start)
    if grid.pp.size > 1:
        loaded.stages = Stages(grid, wire, where)
    return loaded

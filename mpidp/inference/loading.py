"""Loads a trained model from a run's folder or from a Hugging Face folder, for the commands evaluate and generate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.checkpoint.added_rows import AddedRows, fits
from mpidp.checkpoint.manifest import committed, readable
from mpidp.checkpoint.reader import Reader
from mpidp.checkpoint.resume import changed_base_message, open_run
from mpidp.comm.transport import Messages
from mpidp.data.encoder import Encoder
from mpidp.data.shards import TokenStream
from mpidp.data.special_tokens import SpecialTokens, for_run, special_tokens_of
from mpidp.data.tokenizer import Tokenizer, load_tokenizer
from mpidp.errors import DataError, UsageError
from mpidp.hf.folder import ModelFolder
from mpidp.hf.tokens import same
from mpidp.inference.base_folder import BaseFolder, is_base_folder
from mpidp.inference.plausible import MAX_THREADS, check_settings, check_shape
from mpidp.model.kinds import saved_shape
from mpidp.model.part import check_split
from mpidp.model.starting import adapters, base_weights, prepared
from mpidp.parallel.grid import Grid, make_grid
from mpidp.parallel.model_part import ModelPartition
from mpidp.parallel.pipeline import FORWARD, Stages
from mpidp.parallel.tensor import loss_over, share_layers
from mpidp.parallel.tensor_comm import TensorComm
from mpidp.runtime.device import resolve_device, resolve_threads
from mpidp.runtime.log import log
from mpidp.runtime.world import raise_together

Source: TypeAlias = Reader | BaseFolder  # where a model comes from


def home_of(reader: Source) -> Path:
    """Return the folder of the run, or the Hugging Face folder. This folder contains the tokenizer and other files of the
    model. Pure."""
    return reader.path if isinstance(reader, BaseFolder) else reader.path.parent.parent


@dataclass
class Loaded:
    """A model, or this rank's part of it, on its device. dtype: the dtype of matrix products."""

    model: Any
    device: torch.device
    dtype: torch.dtype
    grid: Grid
    stages: Stages | None = None  # this rank's place in a pipeline
    losses: Callable[[Tensor, Tensor], Tensor] | None = None  # computes losses from this rank's logits; None: plain_losses
    tensor_comm: TensorComm | None = None  # communicates with the ranks that compute each layer together
    name: str = "the model"  # the path of the checkpoint; errors show it

    def diverged(self, what: str) -> DataError:
        """Return an error that says that a result is nan or infinite. what: the name of the result. The caller must raise the
        error on every rank of a replica. Independent."""
        return DataError.on_every_rank(
            f"{self.name}: the {what} is not finite (nan or inf), so the training has probably diverged. Use an earlier "
            "checkpoint, or train again with a lower optim.lr"
        )

    @torch.no_grad()
    def forward(self, tokens: Tensor, caches: list[Any] | None = None) -> Tensor | None:
        """Run the model on tokens (B, T). caches: one cache per sequence, with the keys and values of the positions before
        `tokens`, or None to compute without caches.

        Returns logits (B, T, this rank's part of V) on the last pipeline stage, and None on other stages. Collective over
        grid.model.
        """
        stages, tokens = self.stages, tokens.to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            inputs = tokens if stages is None or stages.first else stages.receive(
                FORWARD, 0, (*tokens.shape, self.model.shape.model_dim)
            )
            outputs: Tensor = self.model(inputs) if caches is None else self.model(inputs, caches=caches)
            if getattr(self.model, "defers_head", False):  # a model in training whose loss is computed in chunks
                outputs = self.model.deferred_logits(outputs)
        if stages is None or stages.last:
            return outputs
        stages.send(FORWARD, 0, outputs)
        return None

    def last_logits(self, tokens: Tensor, caches: list[Any] | None = None) -> Tensor:
        """Return the logits of the token that follows each sequence, (B, V) float32 on the CPU. tokens: (B, T). caches: see
        forward(). All ranks of a replica get the same result.

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


def own_tokenizer(reader: Source) -> Path:
    """Return the path of the model's tokenizer.json, in the run or in the Hugging Face folder.

    Raises DataError if the file cannot be read, or has changed since the model was trained. Independent.
    """
    path, restore = home_of(reader) / "tokenizer.json", "Restore it from the shards, or give a tokenizer with --tokenizer"
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}. {restore}") from None
    if found != reader.meta["tokenizer"]:
        raise DataError(f"{path} has changed since the model was trained, so its ids may mean other text. {restore}")
    return path


def check_same_tokenizer(reader: Source, stream: TokenStream) -> None:
    """Raise DataError unless the shards were prepared with the model's tokenizer. The formatting of tokenizer.json does not
    matter. Independent."""
    if stream.tokenizer_sha256 == reader.meta["tokenizer"]:
        return
    own = own_tokenizer(reader)
    if not same(own, stream.index.tokenizer_bytes(stream.folder)):
        raise DataError(f"{stream.path} was prepared with another tokenizer than {own}, so its ids mean other text. Prepare the "
                        f"text again with --tokenizer {own}")


def table_of_run(run_dir: Path, tokenizer: Tokenizer) -> SpecialTokens:
    """Return the table of special tokens of a run. If the run was fine-tuned from a model, the `ends` of the table also
    contain the tokens that end a text of that model. Raises DataError if a file is invalid. Independent."""
    table, base = for_run(run_dir, tokenizer), run_dir / "hf"
    if not base.is_dir():
        return table
    return replace(table, ends=tuple(dict.fromkeys((*table.ends, *special_tokens_of(base, tokenizer).ends))))


def load_encoder(loaded: Loaded, reader: Source, path: str | None, special: str | None = None) -> Encoder:
    """Return an `Encoder` object with a tokenizer and with the special tokens of the training data.

    path: a tokenizer.json or a folder that contains one, or None for the model's tokenizer. special: how names of special tokens
    in a text, such as <|im_start|>, are encoded. With "text", they are encoded like any other text. With "tokens", each name
    becomes the id of its token. With None, they are encoded as in the training data. Raises DataError if a file is missing, has
    changed, or does not suit the model. Independent.
    """
    with readable(reader.path):
        tokenizer = load_tokenizer(path or own_tokenizer(reader), reader.meta["eod"])
        rows, padded = loaded.model.shape.vocab_size, reader.meta["config"].get("model.vocab_size", 0) > 0
        if tokenizer.vocab_size > rows or (tokenizer.vocab_size < rows and not padded):
            raise DataError(f"the tokenizer has {tokenizer.vocab_size} tokens, but the model has {rows}. "
                            "Give another --tokenizer")
        if isinstance(reader, BaseFolder):
            table = special_tokens_of(reader.path, tokenizer)
        else:
            table = table_of_run(home_of(reader), tokenizer)
    if max(table.ends) >= rows or (table.bos or 0) >= rows:
        raise DataError(f"{home_of(reader)}: a special token has an id that the model does not have, because ids must be "
                        f"below {rows}. Restore special_tokens.json from the shards, or correct generation_config.json")
    return Encoder(tokenizer, table, special or table.special)


def open_source(path: Path, world: MPI.Intracomm, seq_len: int = 0) -> Source:
    """Open the newest checkpoint of a run, one checkpoint, or a Hugging Face folder.

    seq_len: the value of --seq-len, or 0 without this option. The option is allowed only for a Hugging Face folder. Rank 0 logs
    notes about the folder. Raises CheckpointError if no valid checkpoint exists, DataError if a folder is invalid, and
    UsageError if seq_len does not suit `path`. Collective over world.
    """
    if not is_base_folder(path):
        if seq_len:
            raise UsageError.on_every_rank(f"--seq-len applies to Hugging Face folders only. Omit it, because {path} has its "
                                           "own model.seq_len")
        return open_run(path, world)
    with raise_together(world):
        folder = BaseFolder(path, seq_len)
    for note in folder.notes_at(folder.meta["config"]["model.seq_len"]) if world.rank == 0 else ():
        log.warning("note: %s", note)
    return folder


def open_model(options: Any, world: MPI.Intracomm, special: str | None = None) -> tuple[Source, Loaded, Encoder]:
    """Open a run's newest checkpoint, one checkpoint, or a Hugging Face folder. Return (a reader of the checkpoint or
    folder, this rank's part of the model, the encoder).

    options: the parsed options run, tokenizer, tp, pp, device, threads, model_kind, base, seq_len. special: see load_encoder().
    Raises CheckpointError or DataError if a file is missing or damaged, and UsageError if an option does not suit the model.
    Collective over world.
    """
    grid = make_grid(world, options.tp, options.pp)
    reader = open_source(Path(options.run), world, options.seq_len)
    with raise_together(world):
        loaded = load_model(reader, grid, options.device, options.threads, options.model_kind, options.base)
        return reader, loaded, load_encoder(loaded, reader, options.tokenizer, special)


def weights_at(path: Path) -> Reader | ModelFolder:
    """Open the weights of a run's newest checkpoint, of one checkpoint, or of a Hugging Face folder. Independent.

    Raises DataError if `path` is none of these.
    """
    if (path / "config.json").is_file():
        return ModelFolder(path)
    found = [path] if (path / "manifest.json").exists() else committed(path / "checkpoints")
    if not found:
        raise DataError(f"{path} is neither a run nor a Hugging Face folder. Restore the model that the run was fine-tuned from, "
                        "or give its new place with --base DIR. A relative path is relative to the current directory")
    return Reader(found[0])


def base_model(reader: Source, parts: ModelPartition, moved: str = "") -> Any:
    """Return the base model of a LoRA run, whose checkpoints contain only the adapters. Its weights come from train.init_from.
    If the run does not have this setting, the weights are initialized from the seed.

    moved: the new path of the base model, or "" if it has not moved. Raises DataError if the base model is missing, has other
    sizes, or has changed. Collective over parts.grid.world.
    """
    settings = reader.meta["config"]
    if "init_from" not in reader.meta:
        return base_weights(settings, parts.shape, parts.part)
    path, wanted = Path(moved or reader.meta["init_from"]["path"]), reader.meta["init_from"]["weights_sha256"]
    with raise_together(parts.grid.world), readable(path):  # before all ranks compute the hash
        weights = weights_at(path)
        if isinstance(weights, Reader):
            stored, tensors = int(weights.meta["shape"]["vocab_size"]), weights.meta["tensors"]
            sizes = {name: tuple(tensors.get(f"model/{name}", {"shape": ()})["shape"]) for name in parts.sizes}
        else:
            stored, sizes = weights.settings["vocab_size"], weights.sizes
        if not fits(sizes, parts.sizes):  # checked before memory is allocated
            raise DataError(f"{path} is not the base model of {reader.path}: its tensors have other sizes. Give "
                            "the right folder with --base")
        model = base_weights(settings, parts.shape, parts.part)
        parts.load(AddedRows(weights, stored) if parts.shape.vocab_size > stored else weights, model)
    if (found := parts.sha256(model)) != wanted:
        raise DataError(changed_base_message(path, found, wanted))
    return model


def load_model(reader: Source, grid: Grid, device: str, threads: int, kind: str = "", base: str = "") -> Loaded:
    """Load this rank's part of the model, and prepare it for inference. Collective over grid.model.

    kind: the option --model.kind, which a custom model requires. base: the new path of the base model of a LoRA run, or "" if it
    has not moved. Raises CheckpointError if the checkpoint is damaged, and UsageError if the grid, the device or the kind does
    not suit the model.
    """
    if not 0 <= threads <= MAX_THREADS:
        raise UsageError(f"--threads {threads}: must be in 0..{MAX_THREADS}; 0 means the number used in training")
    where = resolve_device(device, grid.everyone)
    with readable(reader.path), torch.no_grad():
        if not isinstance(reader, BaseFolder):
            check_settings(reader.path, reader.meta)
        torch.set_num_threads(threads or resolve_threads(reader.meta["fingerprint"]["threads"], grid.everyone))
        shape = saved_shape(reader.meta["config"]["model.kind"], reader.meta["shape"], kind, reader.path)
        if not isinstance(reader, BaseFolder):
            check_shape(reader.path, reader.meta, shape)
        check_split(shape, grid.tp.size, grid.pp.size)
        parts = ModelPartition(replace(grid, world=grid.model), shape)  # generate loads it only on replicas with prompts
        settings = reader.meta["config"]
        if base and not (settings.get("model.lora_rank", 0) and "init_from" in reader.meta):
            raise UsageError(f"--base {base}: {reader.path} needs no base model. Omit --base, which only LoRA runs with "
                             "train.init_from need")
        added = adapters(settings, shape)
        model = base_model(reader, parts, base) if added else base_weights(settings, shape, parts.part)
        model = prepared(model, settings, shape, parts.part).to(where)
        ModelPartition(grid, shape, adapters=added).load(reader, model)
        dtype = torch.float32 if where.type == "cpu" else getattr(torch, reader.meta["config"]["train.dtype"])
    wire, loaded = Messages(where, "host" if where.type == "cpu" else "staged"), Loaded(
        model.eval(), where, dtype, grid, name=str(reader.path)
    )
    if grid.tp.size > 1:
        loaded.tensor_comm = TensorComm(grid, wire)
        share_layers(model, loaded.tensor_comm)
        loaded.losses = loss_over(loaded.tensor_comm, parts.part.own_range(shape.vocab_size).start)
    if grid.pp.size > 1:
        loaded.stages = Stages(grid, wire, where)
    return loaded

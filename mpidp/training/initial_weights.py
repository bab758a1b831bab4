"""Implements train.init_from: initial weights from another run or from a Hugging Face folder.

Only the weights are loaded. The optimizer starts at step 0. On any mesh, each rank loads its own part of the model. RUN/init.json
stores facts about the source. Therefore a run that has a checkpoint can resume without the source.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from mpi4py import MPI

from mpidp.checkpoint.added_rows import AddedRows, fits
from mpidp.checkpoint.manifest import committed, readable
from mpidp.checkpoint.reader import Reader
from mpidp.checkpoint.resume import changed_base_message, open_run, same_path
from mpidp.config.rules import KINDS
from mpidp.config.schema import Config
from mpidp.errors import DataError, UsageError
from mpidp.hf import tokens
from mpidp.hf.companions import OF_TOKENIZER, companions
from mpidp.hf.folder import ModelFolder
from mpidp.model.kinds import check_named
from mpidp.model.options import DEFAULTS as OPTIONS
from mpidp.model.shape import Shape, num_parameters, shapes_of
from mpidp.parallel.model_part import ModelPartition
from mpidp.runtime.files import write_file
from mpidp.runtime.json_file import read_json
from mpidp.runtime.log import log
from mpidp.runtime.world import raise_together

KEYS = (  # settings of section model that determine the shape and the meaning of the weights
    "kind", "options", "num_layers", "num_heads", "num_kv_heads", "model_dim", "hidden_dim", "tie_embeddings", "rope_theta",
    "rope_scaling", "norm_eps", "head_dim", "vocab_size", *OPTIONS,
)


class _Init(TypedDict):
    """The content of RUN/init.json."""

    init_from: str
    settings: dict[str, int | float | str | bool]
    weights_sha256: str


@dataclass(frozen=True)
class Origin:
    """The source of a run's initial weights."""

    path: str  # the value of train.init_from
    settings: dict[str, Any]  # settings of section model
    weights: Reader | ModelFolder | None = None  # None: not needed, because the run resumes from its own checkpoint
    tokenizer: Path | None = None  # tokenizer.json of the source, if it has one
    come_along: Mapping[str, Path] = field(default_factory=dict)  # {name in RUN/hf: file to copy}
    weights_sha256: str = ""  # set after loading
    wanted_sha256: str = ""  # the hash that the weights of a resumed run must have; "": any hash

    def completed(self, config: Config) -> Config:
        """Return the config with the model settings of the source. Raises UsageError if the config sets these settings to other
        values. Also raises UsageError if the source has a custom model that the config does not name. Pure."""
        plain = Config().model
        if (kind := self.settings.get("kind", plain.kind)) not in KINDS:
            check_named(kind, config.model.kind if config.model.kind != plain.kind else "", f"train.init_from={self.path}")
        wrong = [
            f"model.{key}={given!r}, but the source has {value!r}"
            for key, value in self.settings.items()
            if (given := getattr(config.model, key)) not in (value, getattr(plain, key))
            and not (key == "vocab_size" and kind in KINDS and given > value)
        ]
        if wrong:
            raise UsageError(f"train.init_from={self.path} is another model: {'; '.join(wrong)}. Leave these settings out")
        rows = max(self.settings["vocab_size"], config.model.vocab_size)  # rows can be added to the vocabulary (added_rows.py)
        return config.with_values(model=self.settings | {"vocab_size": rows})

    def check_shape(self, shape: Shape) -> None:
        """Raise DataError if the source does not contain a model of this shape. Without this check, wrong sizes in an
        untrusted file could make mpidp allocate all memory of the machine. Independent."""
        if self.weights is None:
            return
        if isinstance(self.weights, ModelFolder):
            stored, room = self.weights.sizes, sys.maxsize  # the folder was checked when it was opened
        else:
            with readable(Path(self.path)):
                tensors, room = self.weights.meta["tensors"], self.weights.num_bytes
                stored = {name[6:]: tuple(tensors[name]["shape"]) for name in tensors if name.startswith("model/")}
        plausible = shape.num_layers <= len(stored) and 4 * num_parameters(shape) <= room + self._added_bytes(shape)
        if not plausible or not fits(stored, shapes_of(shape)):
            raise DataError(f"train.init_from={self.path}: its tensors do not have the sizes that its settings state. The files "
                            "are damaged, or belong to different models")

    def _added_bytes(self, shape: Shape) -> int:
        """Return an upper bound on the bytes of the rows that the run adds to the vocabulary."""
        width = getattr(shape, "model_dim", 0)
        return 8 * width * max(0, shape.vocab_size - int(self.settings["vocab_size"]))

    def check_tokenizer(self, data: Path | str, used: bytes) -> None:
        """Raise DataError unless `used`, the tokenizer of `data`, is the source's tokenizer, possibly with added tokens.
        Independent."""
        if self.tokenizer is not None and not tokens.extends(self.tokenizer, used):
            raise DataError(
                f"{data} was prepared with a different tokenizer than {self.tokenizer}, so its ids mean different text to "
                f"the model. Prepare the text again with: python -m data_tools.prepare --tokenizer {self.tokenizer} --out DIR"
            )

    def load(self, parts: ModelPartition, model: Any) -> Origin:
        """Load the weights of this rank's part into `model`. Return an `Origin` object with the hash of all weights. The hash
        does not depend on the mesh. Raises DataError if the hash is not the required one, or if a weight is not finite.
        Collective over parts.grid.world."""
        assert self.weights is not None
        with raise_together(parts.grid.world), readable(Path(self.path)):
            stored = self.settings["vocab_size"]
            parts.load(AddedRows(self.weights, stored) if parts.shape.vocab_size > stored else self.weights, model)
            for name, p in model.named_parameters():
                if not torch.isfinite(p).all():
                    whole = parts.part.global_name(name)
                    whole = self.weights.stored_name(whole) if isinstance(self.weights, ModelFolder) else whole
                    raise DataError(
                        f"train.init_from={self.path}: the tensor {whole} has values that are nan or inf (as float32). The file "
                        "is damaged, or its training diverged. Use another checkpoint"
                    )
        found = parts.sha256(model)
        if self.wanted_sha256 not in ("", found):
            raise DataError.on_every_rank(changed_base_message(self.path, found, self.wanted_sha256))
        return replace(self, weights_sha256=found)

    def keep(self, run_dir: Path, used: bytes) -> None:
        """Write RUN/init.json, and copy the source's companion files (hf/companions.py) to the folder RUN/hf. `used`: the
        data's tokenizer. If this tokenizer has added tokens, other files of the source's tokenizer are not copied.
        Independent."""
        if self.come_along:
            same = self.tokenizer is None or tokens.same(self.tokenizer, used)
            for name in [name for name in self.come_along if same or name not in OF_TOKENIZER]:
                (run_dir / "hf" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.come_along[name], run_dir / "hf" / name)
        about = {"init_from": self.path, "settings": self.settings, "weights_sha256": self.weights_sha256}
        write_file(run_dir / "init.json", json.dumps(about, indent=1).encode())


def open_origin(config: Config, world: MPI.Intracomm) -> Origin | None:
    """Open and check the source that train.init_from names. Return None if this setting is empty. Raises UsageError if the source
    is neither a run nor a Hugging Face folder. Raises DataError if its files are invalid, and CheckpointError if the source is a
    run without a valid checkpoint. Collective over world."""
    if not config.train.init_from:
        return None
    kept, is_run, path = None, False, Path(config.train.init_from)
    with raise_together(world):
        if world.rank == 0:
            kept = None if config.model.lora_rank else _kept(config)  # checkpoints of adapters do not contain the base weights
            is_run = any((path / name).exists() for name in ("checkpoints", "manifest.json", "metrics.jsonl"))
            home = Path(config.run.dir).resolve()
            if path.exists() and path.resolve() in (home, home / "checkpoints" / path.name):
                raise UsageError(f"train.init_from={path} is in run.dir. To resume, omit this setting. Or choose another run.dir")
            if kept is None and not is_run and not (path / "config.json").is_file():
                raise UsageError(
                    f"train.init_from={path} is neither a run (no checkpoints) nor a Hugging Face folder (no config.json). "
                    "Download a model of the Hub first: hf download NAME --local-dir DIR"
                )
    kept, is_run = world.bcast((kept, is_run))
    if kept is not None:
        return kept
    if is_run:
        return _of_run(str(path), open_run(path, world), world)
    with raise_together(world):
        folder = ModelFolder(path)
        for note in folder.notes_at(config.model.seq_len) if world.rank == 0 else ():
            log.warning("note: %s", note)
        come_along = companions(path, (path / "tokenizer.json").is_file())
        return _with_tokenizer(Origin(str(path), folder.settings, folder, come_along=come_along), path)
    raise AssertionError


def _kept(config: Config) -> Origin | None:
    """Return the source that RUN/init.json describes. Return None if the run does not resume from a checkpoint, or if the file
    is missing or describes another source than train.init_from."""
    run_dir = Path(config.run.dir)
    if config.run.resume == "never" or not committed(run_dir / "checkpoints"):
        return None
    try:
        found = read_json(run_dir / "init.json", _Init)
        if same_path(str(found["init_from"]), config.train.init_from):
            settings = {key: found["settings"][key] for key in KEYS if key in found["settings"]}
            return Origin(found["init_from"], settings, weights_sha256=found["weights_sha256"])
    except (OSError, ValueError):
        pass
    return None


def _of_run(path: str, reader: Reader, world: MPI.Intracomm) -> Origin:
    run = reader.path.parent.parent
    if reader.meta["config"].get("model.lora_rank", 0):
        raise UsageError.on_every_rank(
            f"train.init_from={path} is a LoRA run. Export it with python -m mpidp.export, and use the exported folder"
        )
    with readable(reader.path):
        saved, plain = reader.meta["config"], Config().flat()
        settings = {key: saved.get(f"model.{key}", plain[f"model.{key}"]) for key in KEYS}
        settings["vocab_size"] = int(reader.meta["shape"]["vocab_size"])
    with raise_together(world):
        come_along = companions(run / "hf", of_tokenizer=True)
    return _with_tokenizer(Origin(path, settings, reader, come_along=come_along), run)


def _with_tokenizer(origin: Origin, folder: Path) -> Origin:
    file = folder / "tokenizer.json"
    return replace(origin, tokenizer=file) if file.is_file() else origin

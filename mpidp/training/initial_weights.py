"""train.init_from: where a run's first weights come from, a run of ours or a Hugging Face folder, and what they demand of it.

Weights alone are taken, into a fresh optimizer at step 0, each rank its own part of them on whatever mesh. RUN/init.json keeps
what was found there: once there is a checkpoint, the run goes on without the folder.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpi4py import MPI

from mpidp.checkpoint.manifest import committed, readable
from mpidp.checkpoint.reader import Reader
from mpidp.checkpoint.resume import changed_base_message, open_run
from mpidp.config.schema import Config
from mpidp.errors import DataError, UsageError
from mpidp.hf import tokens
from mpidp.hf.folder import COMPANION_FILES, ModelFolder
from mpidp.parallel.model_part import ModelPartition
from mpidp.runtime.files import write_file
from mpidp.runtime.world import raise_together

KEYS = (  # of section model: what decides its weights and what they compute
    "kind", "options", "num_layers", "num_heads", "num_kv_heads", "model_dim", "hidden_dim", "tie_embeddings", "rope_theta",
    "rope_scaling", "norm_eps", "head_dim", "vocab_size",
)


@dataclass(frozen=True)
class Origin:
    """What a run begins with."""

    path: str  # as train.init_from has it
    settings: dict[str, Any]  # of section model
    weights: Reader | ModelFolder | None = None  # None: the run has a checkpoint of its own
    tokenizer: Path | None = None  # its tokenizer.json, where it has one
    come_along: tuple[Path, ...] = ()  # files to be kept in RUN/hf
    weights_sha256: str = ""  # once they were loaded
    wanted_sha256: str = ""  # by a run that goes on with them; "": any will do

    def completed(self, config: Config) -> Config:
        """The config with the model that is there. UsageError for one that says otherwise. Pure."""
        plain = Config().model
        wrong = [
            f"model.{key}={said!r}, but it has {value!r}"
            for key, value in self.settings.items()
            if (said := getattr(config.model, key)) not in (value, getattr(plain, key))
        ]
        if wrong:
            raise UsageError(f"train.init_from={self.path} is another model: {'; '.join(wrong)}. Leave these settings out")
        return config.with_values(model=self.settings)

    def check_tokenizer(self, data: Path, used: bytes) -> None:
        """DataError unless `data` was prepared with the tokenizer that belongs to the weights. Independent."""
        if self.tokenizer is not None and not tokens.same(self.tokenizer, used):
            raise DataError(
                f"{data} was prepared with another tokenizer than {self.tokenizer}: its ids would mean other text to the model. "
                f"Prepare the text again: python -m data_tools.prepare --tokenizer {self.tokenizer} --out DIR"
            )

    def load(self, parts: ModelPartition, model: Any) -> Origin:
        """This rank's part of the weights, into a model that is whole on its replica's ranks. Afterwards their hash is known, by
        which they are the same on any mesh. DataError for others than wanted. Collective over parts.grid.world."""
        assert self.weights is not None
        with raise_together(parts.grid.world), readable(Path(self.path)):
            parts.load(self.weights, model)
        found = parts.sha256(model)
        if self.wanted_sha256 not in ("", found):
            raise DataError.on_every_rank(changed_base_message(self.path, found, self.wanted_sha256))
        return replace(self, weights_sha256=found)

    def keep(self, run_dir: Path) -> None:
        """RUN/init.json, and in RUN/hf what belongs to the model besides. Independent."""
        if self.come_along:
            shutil.rmtree(run_dir / "hf", ignore_errors=True)
            (run_dir / "hf").mkdir()
            for file in self.come_along:
                shutil.copyfile(file, run_dir / "hf" / file.name)
        about = {"init_from": self.path, "settings": self.settings, "weights_sha256": self.weights_sha256}
        write_file(run_dir / "init.json", json.dumps(about, indent=1).encode())


def open_origin(config: Config, world: MPI.Intracomm) -> Origin | None:
    """What train.init_from names, checked; None where it names nothing. UsageError, DataError, CheckpointError. Collective over
    world."""
    if not config.train.init_from:
        return None
    kept, is_run, path = None, False, Path(config.train.init_from)
    with raise_together(world):
        if world.rank == 0:
            kept = None if config.model.lora_rank else _kept(config)  # adapters are saved without what they lie on
            is_run = any((path / name).exists() for name in ("checkpoints", "manifest.json", "metrics.jsonl"))
            if path.exists() and path.resolve() == Path(config.run.dir).resolve():
                raise UsageError(f"train.init_from={path} is run.dir itself: to go on with a run, leave train.init_from out")
            if kept is None and not is_run and not (path / "config.json").is_file():
                raise UsageError(
                    f"train.init_from={path} is neither a run (no checkpoints) nor a Hugging Face folder (no config.json). A "
                    "model of the Hub is fetched before: hf download NAME --local-dir DIR"
                )
    kept, is_run = world.bcast((kept, is_run))
    if kept is not None:
        return kept
    if is_run:
        return _of_run(str(path), open_run(path, world))
    with raise_together(world):
        folder = ModelFolder(path)
        come_along = tuple(path / name for name in COMPANION_FILES if (path / name).is_file())
        return _with_tokenizer(Origin(str(path), folder.settings, folder, come_along=come_along), path)
    raise AssertionError


def _kept(config: Config) -> Origin | None:
    """As RUN/init.json has it, of a run that has a checkpoint."""
    run_dir = Path(config.run.dir)
    if config.run.resume == "never" or not committed(run_dir / "checkpoints"):
        return None
    try:
        found = json.loads((run_dir / "init.json").read_bytes())
        if found["init_from"] == config.train.init_from:
            settings = {key: found["settings"][key] for key in KEYS if key in found["settings"]}
            return Origin(found["init_from"], settings, weights_sha256=str(found["weights_sha256"]))
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return None


def _of_run(path: str, reader: Reader) -> Origin:
    run = reader.path.parent.parent
    if reader.meta["config"].get("model.lora_rank", 0):
        raise UsageError.on_every_rank(
            f"train.init_from={path} is a run of adapters: export it (python -m mpidp.export), and begin with that folder"
        )
    with readable(reader.path):
        saved, plain = reader.meta["config"], Config().flat()
        settings = {key: saved.get(f"model.{key}", plain[f"model.{key}"]) for key in KEYS}
        settings["vocab_size"] = int(reader.meta["shape"]["vocab_size"])
    come_along = tuple(run / "hf" / name for name in COMPANION_FILES if (run / "hf" / name).is_file())
    return _with_tokenizer(Origin(path, settings, reader, come_along=come_along), run)


def _with_tokenizer(origin: Origin, folder: Path) -> Origin:
    file = folder / "tokenizer.json"
    return replace(origin, tokenizer=file) if file.is_file() else origin

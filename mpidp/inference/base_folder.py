"""Opens a Hugging Face folder for evaluation and generation, for example a base model before it is fine-tuned."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpidp.data.model_files import read_object
from mpidp.data.tokenizer import load_tokenizer
from mpidp.errors import DataError, UsageError
from mpidp.hf.folder import ModelFolder
from mpidp.hf.names import longest_of, shape_of

USUAL_SEQ_LEN = 2048  # longest context that is used without --seq-len
MICRO_BATCH = 8  # windows per forward pass


class BaseFolder(ModelFolder):
    """A Hugging Face folder that can be used like the Reader of a checkpoint. It has the attributes `path` and `meta` and the
    method box(). Independent.

    seq_len: the length of the context. If `seq_len` is 0, the length is the model's maximum, but at most USUAL_SEQ_LEN. Raises
    DataError if the folder is invalid, and UsageError if seq_len exceeds the model's maximum.
    """

    def __init__(self, path: Path, seq_len: int = 0) -> None:
        super().__init__(path)
        longest = longest_of(read_object(path / "config.json"), path / "config.json") or USUAL_SEQ_LEN
        if seq_len > longest:
            raise UsageError(f"--seq-len {seq_len} is too large: the context of {path} has only {longest} tokens (config.json)")
        shape = shape_of(self.settings, seq_len or min(longest, USUAL_SEQ_LEN))
        self.meta: dict[str, Any] = {
            "config": {
                "model.kind": "transformer", "model.seq_len": shape.seq_len, "model.vocab_size": shape.vocab_size,
                "train.micro_batch": MICRO_BATCH, "train.dtype": "float32", "train.seed": 0, "data.documents": "auto",
            },
            "shape": asdict(shape), "fingerprint": {"threads": 0}, "step": 0,
        }
        file = path / "tokenizer.json"
        if not file.is_file():
            raise DataError(f"{path} has no tokenizer.json. Save it with AutoTokenizer.from_pretrained(...).save_pretrained(DIR)")
        self.meta |= {"tokenizer": hashlib.sha256(file.read_bytes()).hexdigest(), "eod": load_tokenizer(file).eod}


def is_base_folder(path: Path) -> bool:
    """Return whether `path` is a Hugging Face folder. Return False for a run and for a checkpoint. Independent."""
    return (path / "config.json").is_file() and not any((path / name).exists() for name in ("checkpoints", "manifest.json"))

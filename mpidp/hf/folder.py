"""A Hugging Face folder of a model of the LLaMA family, read with suspicion: config.json and safetensors, in one file or in
several with an index. Nothing of it is run: pickled weights are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from mpidp.checkpoint.entry import Entry
from mpidp.errors import DataError
from mpidp.hf.names import settings_of, shape_of, theirs
from mpidp.model.shape import shapes_of

MAX_JSON_BYTES = 64 * 2**20
NUMBERS = ("F32", "F16", "BF16", "F64")
COME_ALONG = (  # what else belongs to a model: kept in RUN/hf, and put beside it on export
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)
_SHOWN = 5


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. DataError. Independent."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        found = json.loads(data) if len(data) <= MAX_JSON_BYTES else None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: not a JSON object of at most {MAX_JSON_BYTES} bytes")
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as safetensors ({error}); fetch it again") from None


class Folder:
    """The model in it. DataError says what is wrong, before any weight is read. Independent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = settings_of(read_object(path / "config.json"), path / "config.json")
        self.sizes = shapes_of(shape_of(self.settings))
        self._file_of: dict[str, Path] = {}  # by their name of a tensor
        self._check(self._headers(self._files()))

    def box(self, name: str, entry: Entry) -> Tensor:
        """What this entry holds of model/PARAMETER: as Reader.box of a checkpoint; only what lies in it is read."""
        name = theirs(name.removeprefix("model/"))
        cut = tuple(slice(at, at + length) for at, length in zip(entry.place, entry.tensor.shape, strict=True))
        with _opened(self._file_of[name]) as file:
            return file.get_slice(name)[cut] if entry.shape is not None else file.get_tensor(name)  # type: ignore[no-any-return]

    def _files(self) -> list[Path]:
        """That hold the weights, all of them there."""
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            alone = self.path / "model.safetensors"
            if alone.exists():
                return [alone]
            if pickled := sorted(p.name for p in self.path.glob("*.bin")) + sorted(p.name for p in self.path.glob("*.pt*")):
                raise DataError(
                    f"{self.path}: its weights are pickled ({pickled[0]}), and reading a pickle runs whatever program is in it. "
                    "Fetch the safetensors of this model, or convert them where you trust the file: "
                    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
                )
            raise DataError(f"{self.path}: no model.safetensors and no {index.name}: fetch the folder again, whole")
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) and name == Path(name).name for name in names.values()):
            raise DataError(f"{index}: its weight_map must name files beside it")
        files = [self.path / name for name in sorted(set(names.values()))]
        if missing := [file.name for file in files if not file.exists()]:
            raise DataError(f"{self.path}: {len(missing)} of {len(files)} files of weights are missing: {', '.join(missing)}")
        return files

    def _headers(self, files: list[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
        """(shape, dtype) of every tensor."""
        found = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    about = file.get_slice(name)
                    found[name], self._file_of[name] = (tuple(about.get_shape()), str(about.get_dtype())), path
        return found

    def _check(self, there: dict[str, tuple[tuple[int, ...], str]]) -> None:
        wanted = {theirs(name): size for name, size in self.sizes.items()}
        spare = {"lm_head.weight"} if self.settings["tie_embeddings"] else set()  # a copy of the embedding, that nobody reads
        extra = [name for name in there if name not in wanted and name not in spare and not name.endswith("rotary_emb.inv_freq")]
        complaints = [
            *(f"{name} {list(size)} is missing" for name, size in wanted.items() if name not in there),
            *(
                f"{name} has shape {list(there[name][0])}, config.json says {list(size)}"
                for name, size in wanted.items() if name in there and there[name][0] != size
            ),
            *(
                f"{name} is {there[name][1]}, not one of {', '.join(NUMBERS)}"
                for name in wanted if name in there and there[name][1] not in NUMBERS
            ),
            *(f"{name} {list(there[name][0])} belongs to no such model" for name in extra),
        ]
        if complaints:
            more = f"; and {len(complaints) - _SHOWN} more" * (len(complaints) > _SHOWN)
            raise DataError(f"{self.path}: its tensors are not those of its config.json: {'; '.join(complaints[:_SHOWN])}{more}")


def whole(sizes: dict[str, tuple[int, ...]], name: str) -> Entry:
    """All of a parameter, for box(). Pure."""
    return Entry(torch.empty(sizes[name], device="meta"))

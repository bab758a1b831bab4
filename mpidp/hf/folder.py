"""Read a Hugging Face model folder (LLaMA family): config.json, and weights in one or several safetensors files.

The folder is validated first. No code from the folder is executed, and pickled weights are rejected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from mpidp.checkpoint.entry import Entry
from mpidp.data.model_files import read_object
from mpidp.errors import DataError
from mpidp.hf.names import huggingface_name, settings_of, shape_of, window_of
from mpidp.model.shape import shapes_of

NUMBERS = ("F32", "F16", "BF16", "F64")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCK = 2**22  # elements that are compared at a time
_SHOWN = 5


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as safetensors ({error}); fetch it again") from None


class ModelFolder:
    """A model in a Hugging Face folder. Raises DataError, before weights are loaded, if it is invalid. Independent.

    window: the longest context in which attention covers all earlier tokens; None: any. notes: messages for the user.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.notes = path, list[str]()
        config = read_object(path / "config.json")
        self.settings, self.window = settings_of(config, path / "config.json"), window_of(config, path / "config.json")
        self._file_of: dict[str, Path] = {}  # the file of each tensor, by Hugging Face's name
        self._stored: dict[str, str] = {}  # names in the files, where they differ from the names of the model
        tensors = self._headers(self._files())
        if (layers := self.settings["num_layers"]) > len(tensors):
            found = f"the weight files have {len(tensors)} tensors"
            raise DataError(f"{path / 'config.json'}: num_hidden_layers={layers}, but {found}")
        if self.settings["tie_embeddings"]:
            self.settings["tie_embeddings"] = self._is_tied(tensors)
        self.sizes = shapes_of(shape_of(self.settings))
        self._check(tensors)

    def box(self, name: str, entry: Entry) -> Tensor:
        """Read the entry's box of a parameter, like Reader.box. name: model/PARAMETER. Reads only the data inside the box."""
        name = huggingface_name(name.removeprefix("model/"))
        cut = tuple(slice(at, at + length) for at, length in zip(entry.place, entry.tensor.shape, strict=True))
        name = self._stored.get(name, name)
        with _opened(self._file_of[name]) as file:
            return file.get_slice(name)[cut] if entry.shape is not None else file.get_tensor(name)  # type: ignore[no-any-return]

    def _files(self) -> list[Path]:
        """Return the weight files. Raises DataError if one is missing, or if the weights are pickled."""
        index, alone = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if alone.is_file():
            if index.exists():
                self.notes.append(f"{alone} and {index.name} are both there: model.safetensors is read, as in transformers")
            return [alone]
        if not index.exists():
            if pickled := sorted(p.name for p in self.path.glob("*.bin")) + sorted(p.name for p in self.path.glob("*.pt*")):
                raise DataError(
                    f"{self.path}: its weights are pickled ({pickled[0]}), and loading a pickle can execute any code. Download "
                    "this model's safetensors; or, if you trust the file, convert it: "
                    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
                )
            raise DataError(f"{self.path}: no model.safetensors and no {index.name}: download the complete folder again")
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(_is_name(name) for name in names.values()):
            raise DataError(f"{index}: its weight_map must name files in the same folder")
        files = [self.path / name for name in sorted(set(names.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise DataError(f"{self.path}: {len(missing)} of {len(files)} weight files are missing: {', '.join(missing)}")
        return files

    def _headers(self, files: list[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return (shape, dtype) of each tensor, by name."""
        found = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    header = file.get_slice(name)
                    found[name], self._file_of[name] = (tuple(header.get_shape()), str(header.get_dtype())), path
        return found

    def _is_tied(self, tensors: dict[str, tuple[tuple[int, ...], str]]) -> bool:
        """Return whether embedding and head are one matrix, if config.json says so. As in transformers, the result is False if
        the files have both matrices with different values. If the files have no embedding, the head is also the embedding."""
        if EMBEDDING not in tensors and HEAD in tensors:
            tensors[EMBEDDING], self._stored[EMBEDDING] = tensors.pop(HEAD), HEAD
        if HEAD not in tensors:
            return True
        (shape, dtype), (other, kind) = tensors[EMBEDDING], tensors[HEAD]
        if shape != other or len(shape) != 2 or not {dtype, kind} <= set(NUMBERS):
            return False  # _check reports it
        rows = max(1, BLOCK // max(1, shape[1]))
        with _opened(self._file_of[EMBEDDING]) as one, _opened(self._file_of[HEAD]) as two:
            ours, theirs = one.get_slice(EMBEDDING), two.get_slice(HEAD)
            places = [slice(at, at + rows) for at in range(0, shape[0], rows)]
            if all(torch.equal(ours[place].double(), theirs[place].double()) for place in places):
                return True
        self.notes.append(
            f"{self.path}: config.json has tie_word_embeddings=true, but {HEAD} differs from {EMBEDDING}. Both are used, with "
            "model.tie_embeddings=false, as in transformers"
        )
        return False

    def _check(self, tensors: dict[str, tuple[tuple[int, ...], str]]) -> None:
        wanted = {huggingface_name(name): size for name, size in self.sizes.items()}
        unused = {HEAD} if self.settings["tie_embeddings"] else set()  # a copy of the embedding
        known = {*wanted, *unused}
        extra = [name for name in tensors if name not in known and not name.endswith("rotary_emb.inv_freq")]
        complaints = [
            *(f"{name} {list(size)} is missing" for name, size in wanted.items() if name not in tensors),
            *(
                f"{name} has shape {list(tensors[name][0])}, but config.json implies {list(size)}"
                for name, size in wanted.items() if name in tensors and tensors[name][0] != size
            ),
            *(
                f"{name} is {tensors[name][1]}, not one of {', '.join(NUMBERS)}"
                for name in wanted if name in tensors and tensors[name][1] not in NUMBERS
            ),
            *(f"{name} {list(tensors[name][0])} is not part of such a model" for name in extra),
        ]
        if complaints:
            more = f"; and {len(complaints) - _SHOWN} more" * (len(complaints) > _SHOWN)
            raise DataError(f"{self.path}: its tensors do not match config.json: {'; '.join(complaints[:_SHOWN])}{more}")


def whole(sizes: dict[str, tuple[int, ...]], name: str) -> Entry:
    """Return an entry for a whole parameter, for box(). Pure."""
    return Entry(torch.empty(sizes[name], device="meta"))


def _is_name(name: Any) -> bool:
    """Return whether this is the name of a file without a folder."""
    return isinstance(name, str) and name == Path(name).name and 0 < len(name.encode(errors="replace")) < 256

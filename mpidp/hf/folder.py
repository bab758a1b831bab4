"""Reads a model from a Hugging Face folder. The folder has a config.json, and one or several safetensors files with the weights.

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
from mpidp.hf.fields import head_size
from mpidp.hf.names import family_of, settings_of, sizes_of
from mpidp.hf.tensors import stored_sizes
from mpidp.model.rope_scaling import rope_scaling

NUMBERS = ("F32", "F16", "BF16", "F64")
BLOCK = 2**22  # elements that are compared at a time
_SHOWN = 5


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} cannot be read as safetensors ({error}). Download it again") from None


class ModelFolder:
    """A model in a Hugging Face folder. The constructor raises DataError if the folder is invalid. Independent.

    settings: the settings `model.*`, by name without this prefix. sizes: the shape of each parameter. notes: messages for the
    user.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.notes = path, list[str]()
        config = read_object(path / "config.json")
        self.settings = settings_of(config, path / "config.json")
        self._layout = family_of(config, path).layout
        self._head, self._embedding = self._layout.name("head.weight"), self._layout.name("embedding.weight")
        self._file_of: dict[str, Path] = {}  # the family's name of a tensor -> its file
        self._stored: dict[str, str] = {}  # the family's name of a tensor -> its name in the file, if the two differ
        tensors = self._with_prefix(self._headers(self._files()))
        if (layers := self.settings["num_layers"]) > len(tensors):
            found = f"the weight files have only {len(tensors)} tensors"
            raise DataError(f"{path / 'config.json'}: num_hidden_layers={layers}, but {found}")
        if self.settings["tie_embeddings"]:
            self.settings["tie_embeddings"] = self._is_tied(tensors)
        self.sizes = sizes_of(self.settings)
        self._places = self._layout.places(self.sizes, head_size(self.settings))
        self._check(tensors)

    def box(self, name: str, entry: Entry) -> Tensor:
        """Return one rectangular block of a parameter, and read only this block from the file. name: "model/" followed by the
        name of the parameter. entry: `entry.place` is the index of the block's first element, and `entry.tensor` has the shape
        of the block."""
        place = self._places[name.removeprefix("model/")]
        shape = entry.tensor.shape
        first, rest = entry.place[:1], tuple(slice(at, at + n) for at, n in zip(entry.place[1:], shape[1:], strict=True))
        rows = place.slices(first[0], shape[0])
        with _opened(self._file_of[place.name]) as file:
            stored = file.get_slice(self._stored.get(place.name, place.name))
            boxes = [stored[(*rest, cut)].T if place.transposed else stored[(cut, *rest)] for cut in rows]
            return boxes[0] if len(boxes) == 1 else torch.cat(boxes) if boxes else torch.empty(shape)

    def notes_at(self, seq_len: int) -> list[str]:
        """Return messages for the user of a model whose contexts have `seq_len` tokens. Pure."""
        return self.notes + longrope_notes(self.path, self.settings["rope_scaling"], seq_len)

    def stored_name(self, name: str) -> str:
        """Return the name of the tensor in which the parameter `name` is stored. Pure."""
        return self._places[name].name

    def _files(self) -> list[Path]:
        """Return the weight files. Raises DataError if a file is missing, or if the weights are pickled."""
        index, alone = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if alone.is_file():
            if index.exists():
                self.notes.append(f"{alone} and {index.name} both exist: model.safetensors is read, as in transformers")
            return [alone]
        if not index.exists():
            if pickled := sorted(p.name for p in self.path.glob("*.bin")) + sorted(p.name for p in self.path.glob("*.pt*")):
                raise DataError(
                    f"{self.path}: its weights are pickled ({pickled[0]}), and loading a pickle can execute any code. Download "
                    "this model's safetensors; or, if you trust the file, convert it: "
                    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
                )
            raise DataError(f"{self.path} has no model.safetensors and no {index.name}. Download the complete folder again")
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(_is_name(name) for name in names.values()):
            raise DataError(f"{index}: its weight_map must name files in the same folder")
        files = [self.path / name for name in sorted(set(names.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise DataError(f"{self.path}: {len(missing)} of {len(files)} weight files are missing ({', '.join(missing)}). "
                            "Download them")
        return files

    def _headers(self, files: list[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return {name of a tensor: (shape, dtype)} for the tensors in these files."""
        found = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    header = file.get_slice(name)
                    found[name], self._file_of[name] = (tuple(header.get_shape()), str(header.get_dtype())), path
        return found

    def _with_prefix(self, tensors: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return the tensors under the names that the family uses. If a model was saved without its head, the names in its
        files lack the family's prefix, and this function adds it."""
        prefix = self._layout.prefix
        if any(name.startswith(prefix) for name in tensors):
            return tensors
        found = {}
        for name, header in tensors.items():
            whole = name if name == self._head else prefix + name
            found[whole], self._stored[whole], self._file_of[whole] = header, name, self._file_of[name]
        return found

    def _is_tied(self, tensors: dict[str, tuple[tuple[int, ...], str]]) -> bool:
        """Return whether embedding and head are one matrix, for a config.json with tie_word_embeddings=true. If the files have
        both matrices with different values, return False. If the files have only the head, rename this tensor in `tensors` to
        the embedding, and return True."""
        embedding, head = self._embedding, self._head
        if embedding not in tensors and head in tensors:
            tensors[embedding], self._stored[embedding] = tensors.pop(head), self._stored.get(head, head)
            self._file_of[embedding] = self._file_of[head]
        if head not in tensors:
            return True
        (shape, dtype), (other, kind) = tensors[embedding], tensors[head]
        if shape != other or len(shape) != 2 or not {dtype, kind} <= set(NUMBERS):
            return False  # _check reports it
        rows = max(1, BLOCK // max(1, shape[1]))
        with _opened(self._file_of[embedding]) as one, _opened(self._file_of[head]) as two:
            ours, theirs = one.get_slice(self._stored.get(embedding, embedding)), two.get_slice(self._stored.get(head, head))
            places = [slice(at, at + rows) for at in range(0, shape[0], rows)]
            if all(torch.equal(ours[place].double(), theirs[place].double()) for place in places):
                return True
        self.notes.append(
            f"{self.path}: config.json has tie_word_embeddings=true, but {head} differs from {embedding}. Both are used, with "
            "model.tie_embeddings=false, as in transformers"
        )
        return False

    def _check(self, tensors: dict[str, tuple[tuple[int, ...], str]]) -> None:
        wanted = stored_sizes(self.sizes, self._places)
        unused = {self._head} if self.settings["tie_embeddings"] else set()  # a copy of the embedding
        known = {*wanted, *unused}
        extra = [name for name in tensors if name not in known and not name.endswith(self._layout.ignored)]
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
            *(f"{name} with shape {list(tensors[name][0])} is not part of such a model" for name in extra),
        ]
        if complaints:
            more = f"; and {len(complaints) - _SHOWN} more" * (len(complaints) > _SHOWN)
            raise DataError(f"{self.path}: its tensors do not match config.json ({'; '.join(complaints[:_SHOWN])}{more})")


def longrope_notes(where: object, scaling: str, seq_len: int) -> list[str]:
    """Return messages for the user about a model with contexts of `seq_len` tokens. There is one message if transformers uses
    other longrope factors than mpidp for some inputs, and otherwise none. where: the model's folder. The message names it.
    scaling: the option rope_scaling. Pure."""
    found = rope_scaling(scaling)
    if found is None or found.kind != "longrope" or seq_len <= found.original:
        return []
    return [
        f"{where}: its rope scaling longrope has other factors for inputs above {found.original:.0f} tokens. With "
        f"model.seq_len={seq_len}, mpidp uses these factors for all inputs. transformers uses these factors only for "
        f"inputs above {found.original:.0f} tokens"
    ]


def whole(sizes: dict[str, tuple[int, ...]], name: str) -> Entry:
    """Return the `Entry` object with which ModelFolder.box() reads the whole parameter `name`. sizes: the shapes of all
    parameters. Pure."""
    return Entry(torch.empty(sizes[name], device="meta"))


def _is_name(name: Any) -> bool:
    """Return whether `name` is a file name without a folder."""
    return isinstance(name, str) and name == Path(name).name and 0 < len(name.encode(errors="replace")) < 256

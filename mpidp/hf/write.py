"""Writes a model as a Hugging Face folder, which transformers, vLLM and llama.cpp's converter can read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mpidp.data.model_files import TEMPLATE, read_object
from mpidp.data.special_tokens import SpecialTokens
from mpidp.data.tokenizer import tokenizer_from_json
from mpidp.errors import UsageError
from mpidp.hf.companions import companions
from mpidp.hf.consumers import check
from mpidp.hf.folder import longrope_notes
from mpidp.hf.names import config_of, family_of
from mpidp.hf.tensors import Place, stored_sizes
from mpidp.hf.tokenizer_files import CONFIG, GENERATION, config_ids, text_files, with_begin
from mpidp.hf.tokens import names_of
from mpidp.model.shape import TransformerShape, shapes_of
from mpidp.runtime.files import sync_directory, write_file
from mpidp.runtime.log import log
from mpidp.runtime.work_folder import work_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_folder(
    out: Path, shape: TransformerShape, weight: Callable[[str], Tensor], tokenizer: str, special: SpecialTokens,
    dtype: str = "float32", max_file_bytes: int = 5 * 10**9, before: Path | None = None,
    consumer: str = "",
) -> str:
    """Write a model to the new folder `out`, and return the name of its architecture. The folder appears only when it is
    complete. Raises UsageError if `out` exists or cannot be written, or if no family has the options of the model. Also raises
    UsageError if a weight is too large for the dtype, or if the program `consumer` does not support the model. Independent.

    weight: a function that gets the name of a parameter in mpidp, and returns the parameter. tokenizer: the contents of a
    Hugging Face tokenizer.json. special: the special tokens of the run. before: a folder with the companion files (companions.py)
    of the model that this model was fine-tuned from. The new folder gets copies of these files. None means that this model was
    not fine-tuned from another model.
    """
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists and is not overwritten. Choose another folder, or remove it")
    name, texts, places = _text_files(shape, tokenizer, special, dtype, before)
    for note in (*longrope_notes(out, shape.rope_scaling, shape.seq_len), *(check(consumer, texts) if consumer else ())):
        log.warning("note: %s", note)
    try:
        with work_folder(out) as temporary:
            _write_weights(temporary, shape, places, weight, DTYPES[dtype], max_file_bytes)
            for file, content in texts.items():
                (temporary / file).parent.mkdir(exist_ok=True)
                write_file(temporary / file, content)
            os.rename(temporary, out)
        sync_directory(out.parent)
        return name
    except (OSError, SafetensorError) as error:  # SafetensorError: the disk is full while weights are written
        raise UsageError(f"{out} cannot be written ({error}). Free space on its disk, or choose another folder") from error


def files_of(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Return the names of the tensors of each weight file, in order. sizes: the number of bytes of each tensor. A file has at
    most `max_bytes` bytes, or only one tensor. Pure."""
    files: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not files or size > room:
            files.append([])
            room = max_bytes
        files[-1].append(name)
        room -= size
    return files


def _write_weights(
    folder: Path, shape: TransformerShape, places: Mapping[str, Place], weight: Callable[[str], Tensor], dtype: torch.dtype,
    max_bytes: int,
) -> None:
    whole = shapes_of(shape)
    shapes = stored_sizes(whole, places)
    sizes = {name: dtype.itemsize * int(torch.Size(size).numel()) for name, size in shapes.items()}
    files = files_of(sizes, max_bytes)
    members: dict[str, list[str]] = {}
    for name, where in places.items():
        members.setdefault(where.name, []).append(name)
    place: dict[str, str] = {}
    not_finite: list[str] = []
    for number, names in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(
            {name: _stored(name, shapes[name], {one: places[one] for one in members[name]}, weight, dtype, not_finite)
             for name in names},
            folder / file, metadata={"format": "pt"},
        )
        os.chmod(folder / file, folder.stat().st_mode & 0o666)  # safetensors ignores the umask and makes files owner-only
        with open(folder / file, "rb") as written:
            os.fsync(written.fileno())
        place |= dict.fromkeys(names, file)
    if not_finite:
        log.warning("warning: %d exported tensors contain nan or inf, for example %s, so the training diverged before this "
                    "checkpoint. Use an earlier checkpoint", len(not_finite), not_finite[0])
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(place.items()))}
        write_file(folder / "model.safetensors.index.json", json.dumps(index, indent=2).encode())


def _stored(
    name: str, size: tuple[int, ...], places: Mapping[str, Place], weight: Callable[[str], Tensor], dtype: torch.dtype,
    not_finite: list[str],
) -> Tensor:
    """Return the tensor `name` in the layout of this model family's files. places: the `Place` of each parameter in this tensor.
    weight, dtype, not_finite: see write_folder() and _converted()."""
    found = torch.empty(size, dtype=dtype)
    for parameter, place in places.items():
        values = _converted(name, weight(parameter), dtype, not_finite)
        rows = found.T if place.transposed else found
        at = 0
        for cut in place.slices(0, len(values)):
            rows[cut] = values[at : at + cut.stop - cut.start]
            at += cut.stop - cut.start
    return found


def _converted(name: str, tensor: Tensor, dtype: torch.dtype, not_finite: list[str]) -> Tensor:
    """Return the tensor in this dtype. Add `name` to `not_finite` if the result has nan or inf. Raises UsageError if a finite
    value is too large for the dtype."""
    found = tensor.to(dtype)
    bad = ~torch.isfinite(found)
    if bad.any():
        not_finite += [name] if name not in not_finite else []
        if torch.isfinite(tensor[bad]).any():
            largest = float(tensor[torch.isfinite(tensor)].abs().max())
            wider = "float32" if dtype == torch.bfloat16 else "bfloat16 or float32"
            raise UsageError(
                f"the tensor {name} has values up to {largest:.6g}, but the largest value of --dtype "
                f"{str(dtype).removeprefix('torch.')} is {torch.finfo(dtype).max:.6g}. Use --dtype {wider}"
            )
    return found


def _text_files(
    shape: TransformerShape, tokenizer: str, special: SpecialTokens, dtype: str, before: Path | None
) -> tuple[str, dict[str, bytes], dict[str, Place]]:
    """Return (architecture, files, places). architecture: the name of the model's class in transformers. files: the contents of
    each file except the weights, by file name. places: {name: `Place` object} of each parameter in the weights."""
    kept = companions(before, of_tokenizer=True) if before is not None else {}
    objects = {name: read_object(kept[name]) for name in ("config.json", CONFIG, GENERATION) if name in kept}
    ids = {"eos_token_id": special.ends[0]} if objects else config_ids(special)
    config = config_of(shape, dtype, ids, objects.get("config.json", {}))
    if not objects or special.bos != tokenizer_from_json(tokenizer, special.ends[0]).bos:
        tokenizer = with_begin(tokenizer, special.bos)
    family = family_of(config, "config.json")
    made = text_files(special, names_of(tokenizer), objects, config[family.longest])
    if TEMPLATE in made:
        kept.pop("chat_template.json", None)
    texts = {file: path.read_bytes() for file, path in kept.items()}
    for file, content in ({"config.json": config} | made).items():
        texts[file] = (content if isinstance(content, str) else json.dumps(content, indent=2) + "\n").encode()
    texts["tokenizer.json"] = tokenizer.encode()
    return family.architecture, texts, family.layout.places(shapes_of(shape), shape.head_dim)

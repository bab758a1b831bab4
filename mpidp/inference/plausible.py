"""Rejects the manifest of a checkpoint if it states a size that is not plausible. Pure.

A manifest may come from an untrusted source, and a few bytes in it could make mpidp request all memory of this machine.
Therefore, call these checks before memory is allocated and threads are started.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpidp.errors import CheckpointError
from mpidp.model.shape import Shape, shapes_of
from mpidp.model.starting import adapters

LIMITS = {  # largest plausible values, by key of the manifest's settings; the smallest is 1
    "model.seq_len": 2**22,
    "model.num_layers": 2**16,
    "train.micro_batch": 2**20,
}
MAX_THREADS = 1024
MAX_SIZE = 2**31  # largest plausible dimension of the model
ZERO_IS_FINE = ("head_size", "position_rows", "rotary_dims", "window")  # fields of a shape that may be 0, which means the default


def check_settings(path: Path, meta: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a size that a manifest states is not plausible. The message names the size. path: the checkpoint.
    meta: the contents of its manifest."""
    stated = {key: (meta["config"][key], 1, most) for key, most in LIMITS.items()}
    stated["fingerprint threads"] = (meta["fingerprint"]["threads"], 1, MAX_THREADS)
    for key, value in meta["shape"].items():
        if type(value) is int:
            stated[f"shape {key}"] = (value, 0 if key in ZERO_IS_FINE else 1, LIMITS.get(f"model.{key}", MAX_SIZE))
    for key, (value, least, most) in stated.items():
        if type(value) is not int or not least <= value <= most:
            raise CheckpointError(f"{path / 'manifest.json'}: {key}={value!r} is not an integer in {least}..{most}. "
                                  "Copy the checkpoint again from a backup, or use an older checkpoint")
    if not isinstance(meta["config"]["data.path"], str):
        raise CheckpointError(f"{path / 'manifest.json'}: data.path={meta['config']['data.path']!r} is not a path")


def check_shape(path: Path, meta: Mapping[str, Any], shape: Shape) -> None:
    """Raise CheckpointError if a checkpoint's files are too small to contain a model of this shape or, for a LoRA run, its
    adapters. path: the checkpoint. meta: the contents of its manifest, which states the sizes of the files."""
    needed = sum(map(math.prod, (adapters(meta["config"], shape) or shapes_of(shape)).values()))
    stored = sum(int(record["bytes"]) for record in meta["files"])
    if needed > stored:
        raise CheckpointError(
            f"{path / 'manifest.json'}: its shape has {shape.num_layers:,} layers, and {needed:,} parameters are saved, but its "
            f"files hold {stored:,} bytes. Copy the checkpoint again from a backup, or use an older checkpoint"
        )

"""The model as a run begins with it: its base weights, adapters on them where the run trains adapters alone, and what is frozen.

A checkpoint of a run with adapters holds these alone, so whoever opens one comes here for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mpidp.errors import UsageError
from mpidp.model.frozen import frozen, trained
from mpidp.model.kinds import make_model
from mpidp.model.lora import A, B, adapters_of, attach
from mpidp.model.part import Part
from mpidp.model.shape import Shape, shapes_of

Settings = Mapping[str, Any]  # of the run, by section.key; those of earlier versions lack some


def base_weights(settings: Settings, shape: Shape, part: Part) -> Any:
    """The model, or this part of it, before its first step and without adapters: drawn by the seed. On the CPU, the same on every
    rank. Independent."""
    return make_model(shape, settings["train.seed"], part)


def prepared(model: Any, settings: Settings, shape: Shape, part: Part) -> Any:
    """The same model with adapters on its weights, and with what is not trained frozen. UsageError for what cannot be.
    Independent."""
    if rank := settings.get("model.lora_rank", 0):
        attach(model, rank, settings["model.lora_alpha"], settings["model.lora_targets"], settings["train.seed"])
    if patterns := settings.get("optim.freeze", ""):
        parameters = {part.global_name(name): p for name, p in model.named_parameters()}
        is_whole = part.has_embedding and part.has_head and len(part.layers) == shape.num_layers
        for name in frozen(list(parameters if is_whole else shapes_of(shape)), patterns) & set(parameters):
            parameters[name].requires_grad_(False)
    return model


def trained_sizes(settings: Settings, shape: Shape, part: Part) -> dict[str, tuple[int, ...]]:
    """The shapes of what is trained of a model, or of this part of it. UsageError for what cannot be, such as a part of
    which nothing is trained. Pure."""
    sizes, names = part.sizes(shapes_of(shape)), list(shapes_of(shape))
    if rank := settings.get("model.lora_rank", 0):
        layers = {name.removesuffix(".weight"): size for name, size in sizes.items() if len(size) == 2}
        layers.pop("embedding", None)
        found = {name: layers[name] for name in adapters_of(layers, rank, settings["model.lora_targets"])}
        sizes = {name + A: (rank, size[1]) for name, size in found.items()}
        sizes |= {name + B: (size[0], rank) for name, size in found.items()}
        names += list(sizes)
    patterns = settings.get("optim.freeze", "")
    still = frozen(names, patterns)
    left = {name: size for name, size in sizes.items() if name not in still}
    if not left:
        where = "of a stage of the pipeline" if len(part.layers) < shape.num_layers else "that there is to train"
        raise UsageError(f"optim.freeze={patterns} freezes every parameter {where}: leave something to train")
    return left


def trained_on_paper(settings: Settings, shape: Shape, part: Part) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of what is trained, without the memory of a model, but with torch's meta device. Independent."""
    with torch.device("meta"):
        return trained(prepared(base_weights(settings, shape, part), settings, shape, part))

"""Makes the model at the start of a run: base weights, LoRA adapters, and frozen parameters.

The checkpoints of a LoRA run contain only the adapters. Code that reads them makes the base model with this module.
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
from mpidp.model.shape import Shape, TransformerShape, shapes_of

Settings = Mapping[str, Any]  # the run's settings, by section.key; runs of earlier versions have fewer


def base_weights(settings: Settings, shape: Shape, part: Part) -> Any:
    """Return the model, or this part of it, without adapters. Its weights are initialized from the seed.

    The weights are on the CPU. All ranks initialize a parameter to the same values. Independent.
    """
    model = make_model(shape, settings["train.seed"], part)
    if settings.get("model.zero_init", False) and isinstance(shape, TransformerShape):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(("attention.o.weight", "feed_forward.down.weight")):
                    p.zero_()
    return model


def prepared(model: Any, settings: Settings, shape: Shape, part: Part) -> Any:
    """Add the run's LoRA adapters to the model, freeze parameters, and return the model. Independent.

    Raises UsageError if an entry of model.lora_targets or optim.freeze matches nothing, or if model.lora_rank is too large.
    """
    if rank := settings.get("model.lora_rank", 0):
        attach(model, rank, settings["model.lora_alpha"], settings["model.lora_targets"], settings["train.seed"])
    if patterns := settings.get("optim.freeze", ""):
        parameters = {part.global_name(name): p for name, p in model.named_parameters()}
        is_whole = part.has_embedding and part.has_head and len(part.layers) == shape.num_layers
        for name in frozen(list(parameters if is_whole else shapes_of(shape)), patterns) & set(parameters):
            parameters[name].requires_grad_(False)
    return model


def trained_sizes(settings: Settings, shape: Shape, part: Part) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} for the trained parameters of this part. Pure.

    Raises UsageError if no parameter is trained, and in the cases of prepared().
    """
    sizes, names = part.sizes(shapes_of(shape)), list(shapes_of(shape))
    if rank := settings.get("model.lora_rank", 0):
        layers = {name.removesuffix(".weight"): size for name, size in sizes.items() if len(size) == 2}
        for table in ("embedding", "positions"):
            layers.pop(table, None)
        found = {name: layers[name] for name in adapters_of(layers, rank, settings["model.lora_targets"])}
        sizes = {name + A: (rank, size[1]) for name, size in found.items()}
        sizes |= {name + B: (size[0], rank) for name, size in found.items()}
        names += list(sizes)
    patterns = settings.get("optim.freeze", "")
    fixed = frozen(names, patterns)
    left = {name: size for name, size in sizes.items() if name not in fixed}
    if not left:
        where = " of a pipeline stage" if len(part.layers) < shape.num_layers else ""
        raise UsageError(f"optim.freeze={patterns} freezes all trainable parameters{where}: leave at least one to train")
    return left


def trained_on_meta(settings: Settings, shape: Shape, part: Part) -> list[tuple[str, torch.nn.Parameter]]:
    """Return (name, parameter) of each trained parameter. The parameters are on torch's meta device, which needs no memory.
    Independent."""
    with torch.device("meta"):
        return trained(prepared(base_weights(settings, shape, part), settings, shape, part))

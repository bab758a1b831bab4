"""Makes the model at the start of a run: base weights, LoRA adapters, and frozen parameters.

The checkpoints of a LoRA run contain only the adapters. Code that reads such a checkpoint makes the base model with this
module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mpidp.errors import UsageError
from mpidp.model.adapter_sizes import adapter_sizes
from mpidp.model.frozen import frozen, trained
from mpidp.model.kinds import make_model
from mpidp.model.lora import attach
from mpidp.model.part import Part
from mpidp.model.shape import Shape, TransformerShape, shapes_of

Settings = Mapping[str, Any]  # the run's settings, by section.key; runs of earlier versions have fewer


def base_weights(settings: Settings, shape: Shape, part: Part) -> Any:
    """Return the model, or the part of it that `part` describes, without adapters. Its weights are initialized from the seed.

    The weights are on the CPU. All ranks initialize a parameter to the same values. Independent.
    """
    model = make_model(shape, settings["train.seed"], part)
    if settings.get("model.zero_init", False) and isinstance(shape, TransformerShape):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(("attention.o.weight", "feed_forward.down.weight")):
                    p.zero_()
    return model


def adapters(settings: Settings, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of the run's adapters in the whole model, by name. Without LoRA, return {}. Raises
    UsageError in the same cases as prepared(). Pure."""
    rank = settings.get("model.lora_rank", 0)
    return adapter_sizes(shapes_of(shape), rank, settings["model.lora_targets"]) if rank else {}


def prepared(model: Any, settings: Settings, shape: Shape, part: Part) -> Any:
    """Add the run's LoRA adapters to the model, freeze parameters, and return the model. Independent.

    Raises UsageError if an entry of model.lora_targets or optim.freeze matches nothing, or if model.lora_rank is too large.
    """
    if rank := settings.get("model.lora_rank", 0):
        attach(model, rank, settings["model.lora_alpha"], settings["model.lora_targets"], settings["train.seed"])
    if patterns := settings.get("optim.freeze", ""):
        parameters = {part.global_name(name): p for name, p in model.named_parameters()}
        is_whole = part.has_embedding and part.has_head and len(part.layers) == shape.num_layers
        names = parameters if is_whole else shapes_of(shape) | adapters(settings, shape)
        for name in frozen(list(names), patterns) & set(parameters):
            parameters[name].requires_grad_(False)
    return model


def trained_sizes(settings: Settings, shape: Shape, part: Part) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} for the trained parameters of `part`, the part of the model on one rank. Pure.

    Raises UsageError if no parameter is trained, and in the same cases as prepared().
    """
    base, added = shapes_of(shape), adapters(settings, shape)
    patterns = settings.get("optim.freeze", "")
    fixed = frozen([*base, *added], patterns)
    left = {name: size for name, size in part.sizes(added or base).items() if name not in fixed}
    if not left:
        where = " of a pipeline stage" if len(part.layers) < shape.num_layers else ""
        raise UsageError(f"optim.freeze={patterns} freezes all trainable parameters{where}: leave at least one to train")
    return left


def trained_on_meta(settings: Settings, shape: Shape, part: Part) -> list[tuple[str, torch.nn.Parameter]]:
    """Return a list of (name, parameter) pairs of the trained parameters. These parameters are on torch's meta device, which
    needs no memory. Independent."""
    with torch.device("meta"):
        return trained(prepared(base_weights(settings, shape, part), settings, shape, part))

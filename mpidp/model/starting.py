"""The model as a run begins with it: its base weights, adapters on them where the run trains adapters alone, and what is frozen.

A checkpoint of a run with adapters holds these alone, so whoever opens one comes here for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mpidp.model.frozen import freeze, trained
from mpidp.model.lora import attach
from mpidp.model.part import Part
from mpidp.model.shape import TransformerShape, shapes_of
from mpidp.model.transformer import MODELS

Settings = Mapping[str, Any]  # of the run, by section.key; those of earlier versions lack some


def base_weights(settings: Settings, shape: TransformerShape, part: Part) -> Any:
    """The model, or this part of it, before its first step and without adapters: drawn by the seed. On the CPU, the same on every
    rank. Independent."""
    return MODELS[settings["model.kind"]](shape, settings["train.seed"], part)


def starting_model(settings: Settings, shape: TransformerShape, part: Part) -> Any:
    """The same with adapters, and with what is not trained frozen. UsageError for what cannot be. Independent."""
    model = base_weights(settings, shape, part)
    if rank := settings.get("model.lora_rank", 0):
        attach(model, rank, settings["model.lora_alpha"], settings["model.lora_targets"], settings["train.seed"])
    if patterns := settings.get("optim.freeze", ""):
        parameters = {part.global_name(name): p for name, p in model.named_parameters()}
        is_whole = part.embeds and part.speaks and len(part.layers) == shape.num_layers
        freeze(parameters, patterns, list(parameters if is_whole else shapes_of(shape)))
    return model


def trained_on_paper(settings: Settings, shape: TransformerShape, part: Part) -> list[tuple[str, torch.nn.Parameter]]:
    """What of the model is trained, without the memory of one. UsageError. Independent."""
    with torch.device("meta"):
        return trained(starting_model(settings, shape, part))

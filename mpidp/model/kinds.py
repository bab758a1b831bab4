"""The model classes by shape: the only place that maps model.kind to a class. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpidp.model.lstm import LSTM
from mpidp.model.own import CustomModel
from mpidp.model.part import Part
from mpidp.model.shape import CustomShape, LSTMShape, Shape, TransformerShape
from mpidp.model.transformer import Transformer

SHAPES: dict[str, Any] = {"transformer": TransformerShape, "lstm": LSTMShape}
MODELS: dict[type, Any] = {TransformerShape: Transformer, LSTMShape: LSTM, CustomShape: CustomModel}


def make_model(shape: Shape, seed: int = 0, part: Part | None = None) -> Any:
    """Make the model, or a part of it, with parameters initialized from the seed. UsageError if a custom model fails. Pure."""
    return MODELS[type(shape)](shape, seed, part)


def saved_shape(kind: str, saved: Mapping[str, Any]) -> Shape:
    """Return the shape saved in a checkpoint of a run with this model.kind. TypeError if it is another kind's. Pure."""
    return SHAPES.get(kind, CustomShape)(**saved)  # type: ignore[no-any-return]

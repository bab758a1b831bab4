"""Maps model.kind to a shape class, and a shape to its model class. No other file does this. Pure."""

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
    """Make the model, or a part of it, with parameters initialized from the seed. Pure.

    Raises UsageError if the factory of a custom model fails.
    """
    return MODELS[type(shape)](shape, seed, part)


def saved_shape(kind: str, saved: Mapping[str, Any]) -> Shape:
    """Return the shape saved in a checkpoint of a run with this model.kind. Pure.

    Raises TypeError if the saved fields are those of another kind.
    """
    return SHAPES.get(kind, CustomShape)(**saved)  # type: ignore[no-any-return]

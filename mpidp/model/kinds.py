"""Maps model.kind to a shape class, and a shape class to a model class. No other file does this. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpidp.errors import DataError, UsageError
from mpidp.model.lstm import LSTM
from mpidp.model.option_checks import check_options
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


def check_named(kind: Any, named: str, where: object) -> None:
    """Raise UsageError if a file of a run names a custom model that the user did not name. Pure.

    Opening a run from another person must not import or call anything that its files name. kind: model.kind in the file `where`.
    named: model.kind on the user's own command line, "" if it is not there. Raises DataError if `kind` is not a string.
    """
    if not isinstance(kind, str):
        raise DataError(f"{where}: model.kind={kind!r} is not a string: the file is damaged")
    if named not in ("", kind):
        raise UsageError(f"{where} has model.kind={kind}, not {named}: correct --model.kind, or leave it out for a built-in kind")
    if kind not in SHAPES and named != kind:
        raise UsageError(
            f"{where} has model.kind={kind}: opening it imports this module and calls the factory. If you trust this code, add "
            f"--model.kind={kind}. A run's files alone never cause code to run"
        )


def saved_shape(kind: str, saved: Mapping[str, Any], named: str = "", where: object = "the checkpoint") -> Shape:
    """Return the shape saved in a checkpoint of a run with this model.kind. Pure.

    named: see check_named. Raises UsageError if the run has a custom model and `named` is not its kind. Raises TypeError if the
    saved fields are those of another kind. Raises ValueError if an option of the Transformer is invalid, or if the saved
    arguments of a custom model are not plain values.
    """
    check_named(kind, named, where)
    if kind in SHAPES:
        known = SHAPES[kind](**saved)
        if isinstance(known, TransformerShape):
            check_options(known)
        return known  # type: ignore[no-any-return]
    shape = CustomShape(**saved)
    if shape.factory != kind or not all(isinstance(value, (bool, int, float, str)) for value in shape.arguments.values()):
        raise ValueError(f"the checkpoint has the factory {shape.factory!r} with the arguments {shape.arguments!r}, which "
                         f"is not a model of model.kind={kind}")
    return shape

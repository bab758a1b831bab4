"""Maps model.kind to a shape class, and a shape class to a model class. Pure."""

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
    """Return the model, or a part of it, with parameters initialized from the seed. Pure.

    part: the part of the model on this rank, or None for the whole model. Raises UsageError if the factory of a custom model
    fails.
    """
    return MODELS[type(shape)](shape, seed, part)


def check_named(kind: Any, named: str, where: object) -> None:
    """Raise UsageError if a file of a run names a custom model that the command line does not name, or if the command line
    names another kind of model. Pure.

    Without this check, opening another person's run could execute code that only its files name. kind: model.kind in the file
    `where`. named: model.kind on the command line, or "" without this option. Raises DataError if `kind` is not a string.
    """
    if not isinstance(kind, str):
        raise DataError(f"{where} is damaged: its model.kind={kind!r} is not a string")
    if named not in ("", kind):
        raise UsageError(f"{where} has model.kind={kind}, but you gave --model.kind={named}. Correct this option, or omit it "
                         "for a built-in kind")
    if kind not in SHAPES and named != kind:
        raise UsageError(
            f"{where} has model.kind={kind}. To open it, mpidp must import this module and call its factory. mpidp does not "
            f"run code only because a run's files name it. If you trust this code, add --model.kind={kind}"
        )


def saved_shape(kind: str, saved: Mapping[str, Any], named: str = "", where: object = "the checkpoint") -> Shape:
    """Return the model shape that a checkpoint contains. Pure.

    kind: model.kind of the run. saved: the fields of the shape. named, where: see check_named(). Raises UsageError in
    the same cases as check_named(). Raises TypeError if `saved` has the fields of another kind. Raises ValueError if an option of
    the Transformer is invalid, or if the arguments of a custom model are not plain values.
    """
    check_named(kind, named, where)
    if kind in SHAPES:
        known = SHAPES[kind](**saved)
        if isinstance(known, TransformerShape):
            check_options(known)
        return known  # type: ignore[no-any-return]
    shape = CustomShape(**saved)
    if shape.factory != kind or not all(isinstance(value, (bool, int, float, str)) for value in shape.arguments.values()):
        raise ValueError(f"the checkpoint names the factory {shape.factory!r} with the arguments {shape.arguments!r}, which "
                         f"does not match model.kind={kind}")
    return shape

"""Converts fields of config.json to options of the model, and back. families.py lists the `Field` objects of each model
family. Pure, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, NoReturn

from mpidp.errors import DataError

Options = dict[str, Any]  # settings model.*, by name without this prefix
MOST = 2**31 - 1
ACTIVATIONS = {  # name in transformers -> option; if an option has several names, the first is written
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu2": "relu2",
}


class Given:
    """The contents of a config.json. where: the file's path. Errors name it."""

    def __init__(self, config: Mapping[str, Any], where: object) -> None:
        self.config, self.where = config, where

    def refuse(self, message: str) -> NoReturn:
        """Raise DataError with the path and `message`. Pure."""
        raise DataError(f"{self.where}: {message}")

    def number(self, key: str, kind: type = int, default: float | None = None, most: float = MOST) -> Any:
        """Return the value of the field `key`, which must be positive. If the field is missing or null, return `default`. kind:
        int or float. most: the largest value that is accepted. Raises DataError if the value is not accepted, or if it is
        missing and `default` is None. Pure."""
        value = self.config.get(key)
        value = default if value is None else value
        if value is None:
            self.refuse(f"{key} is missing, so the file is damaged or belongs to another kind of model")
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not plain or not 0 < value <= most or kind(value) != value:
            self.refuse(f"{key}={short(value)} must be a positive {'integer' if kind is int else 'number'} of at most {most:,}")
        return kind(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return the boolean value of the field `key`. If the field is missing, return `default`. If it is null, return False.
        Raises DataError if the value is not a boolean. Pure."""
        value = self.config.get(key, default)
        value = False if value is None else value
        if not isinstance(value, bool):
            self.refuse(f"{key}={short(value)} must be true or false")
        return value


@dataclass(frozen=True)
class Field:
    """One or several fields of config.json, and the options of the model that they determine.

    keys: the names of the fields. options: the names of the options. read(given, found): returns the options that the
    config.json `given` describes. `found` has the options that earlier Fields in Family.fields returned. write(options):
    returns the fields that describe a model with these options. If no value of a field can express an option, config_of()
    raises UsageError.
    """

    keys: tuple[str, ...]
    options: tuple[str, ...]
    read: Callable[[Given, Options], Options]
    write: Callable[[Options], dict[str, Any]]


def size(key: str, option: str, default: Callable[[Options], int] | None = None, most: int = MOST) -> Field:
    """Return the `Field` object of the field `key`, a positive integer, and of the option with the same value. default: a
    function that computes the value of a missing field from the options of earlier Fields. If `default` is None, a missing
    field is an error. most: the largest value that is accepted."""

    def read(given: Given, found: Options) -> Options:
        return {option: given.number(key, int, None if default is None else default(found), most)}

    return Field((key,), (option,), read, lambda options: {key: options[option]})


def number(
    key: str, option: str, default: float, into: Callable[[float, Options], float] = lambda value, _: value,
    back: Callable[[float, Options], float] = lambda value, _: value, most: float = 2.0**62,
) -> Field:
    """Return the `Field` object of the field `key`, a positive number. default: the number if the field is missing. into: a
    function that converts the number to the option. back: a function that converts the option to the number. The second
    argument of both functions has the other options."""

    def read(given: Given, found: Options) -> Options:
        return {option: float(into(given.number(key, float, default, most), found))}

    return Field((key,), (option,), read, lambda options: {key: back(options[option], options)})


def cap(key: str, option: str, default: float | None) -> Field:
    """Return the `Field` object of a soft-cap. If the field is null, there is no soft-cap, and the option is 0. default: the
    value if the field is missing."""

    def read(given: Given, found: Options) -> Options:
        value = given.config.get(key, default)
        return {option: 0.0 if value is None else given.number(key, float, default, 2.0**62)}

    return Field((key,), (option,), read, lambda options: {key: options[option] or None})


def flag(key: str, default: bool, on: Options, off: Options) -> Field:
    """Return the `Field` object of a boolean that determines several options. on: the options if the boolean is true. off: the
    options if it is false. default: the boolean if the field is missing."""

    def write(options: Options) -> dict[str, Any]:
        return {key: any(options[name] == value != off[name] for name, value in on.items())}

    return Field((key,), tuple(on), lambda given, found: dict(on if given.flag(key, default) else off), write)


def activation(key: str, default: str, names: Mapping[str, str] = ACTIVATIONS) -> Field:
    """Return the `Field` object of the activation function. names: maps each name that the family accepts in config.json to the
    value of the option `activation`. default: the name if the field is missing."""

    def read(given: Given, found: Options) -> Options:
        name = given.config.get(key, default)
        if not isinstance(name, str) or name not in names:
            given.refuse(f"{key}={short(name)} is not supported. mpidp's Transformer supports {', '.join(names)}")
        return {"activation": names[name]}

    def write(options: Options) -> dict[str, Any]:
        fits = [name for name, option in names.items() if option == options["activation"]]
        return {key: default if default in fits else (fits or [options["activation"]])[0]}

    return Field((key,), ("activation",), read, write)


def implied(option: str, value: Callable[[Options], Any]) -> Field:
    """Return a `Field` object for an option that config.json does not contain. value: a function that computes the option from
    the options of earlier Fields."""
    return Field((), (option,), lambda given, found: {option: value(found)}, lambda options: {})


def tied(default: bool) -> Field:
    """Return the `Field` object of tie_word_embeddings. default: the value if the field is missing."""
    return flag("tie_word_embeddings", default, {"tie_embeddings": True}, {"tie_embeddings": False})


def head_dim(default: int = 0) -> Field:
    """Return the `Field` object of head_dim. default: the value if the field is missing, or 0 for hidden_size /
    num_attention_heads."""

    def read(given: Given, found: Options) -> Options:
        return {"head_dim": given.number("head_dim", default=default or found["model_dim"] // found["num_heads"] or None)}

    return Field(("head_dim",), ("head_dim",), read, lambda options: {"head_dim": head_size(options)})


def kv_heads(usual: int = 0) -> Field:
    """Return the `Field` object of num_key_value_heads. usual: the value if the field is missing, or 0 for num_attention_heads.
    null also means num_attention_heads, as in transformers."""

    key, option = "num_key_value_heads", "num_kv_heads"

    def read(given: Given, found: Options) -> Options:
        return {option: given.number(key, default=usual if usual and key not in given.config else found["num_heads"])}

    return Field((key,), (option,), read, lambda options: {key: options[option]})


def head_size(options: Mapping[str, Any]) -> int:
    """Return the size of a head. options: the options of a model. Pure."""
    return int(options.get("head_dim", 0) or options["model_dim"] // options["num_heads"])

"""Converts fields of config.json that differ by layer: sliding windows, and layers without rotary positions. Pure, without
torch."""

from __future__ import annotations

from collections.abc import Callable
from reprlib import repr as short
from typing import Any

from mpidp.hf.fields import Field, Given, Options

WINDOW, FULL = "sliding_attention", "full_attention"
LETTER = {WINDOW: "w", FULL: "f"}


def per_layer(pattern: str, layers: int, otherwise: str) -> str:
    """Return a string with one letter for each of the `layers` layers. It repeats the letters of `pattern`, or those of
    `otherwise` if `pattern` is empty. Pure."""
    pattern = pattern or otherwise
    return (pattern * (layers // len(pattern) + 1))[:layers]


def shortest(letters: str) -> str:
    """Return the shortest pattern that gives `letters` when per_layer() repeats it. Pure."""
    return next(letters[:n] for n in range(1, len(letters) + 1) if per_layer(letters[:n], len(letters), "") == letters)


def window(default: int | None) -> Field:
    """Return the `Field` object of `sliding_window`, for a family in which all layers have the same window. default: the value
    if the field is missing."""

    def read(given: Given, found: Options) -> Options:
        return {"window": _window(given, default) or 0, "window_layers": ""}

    keys, options = ("sliding_window",), ("window", "window_layers")
    return Field(keys, options, read, lambda options: {"sliding_window": options["window"] or None})


def _window(given: Given, default: int | None) -> int | None:
    value = given.config.get("sliding_window", default)
    if value is not None and (type(value) is not int or not 0 < value < 2**31):
        given.refuse(f"sliding_window={short(value)} must be a positive integer or null")
    return value


def layered_window(
    default: int | None, usual: Callable[[Given, Options, bool], str], switch: bool = False, more: tuple[str, ...] = (),
    back: Callable[[Options], dict[str, Any]] = lambda options: {},
) -> Field:
    """Return the `Field` object of the fields `sliding_window` and `layer_types`.

    A layer has the letter "w" if it has a window, and "f" if it has full attention. default: the value of sliding_window if
    this field is missing. usual(given, found, has_window): a function that returns the letters of all layers if layer_types is
    missing. given, found: as in Field.read. has_window: whether the model has a window. switch: True if models of the family
    have the window only when use_sliding_window is true. more: the names of other fields that `usual` reads. back(options): a
    function that returns these other fields for a model with these options.
    """

    def read(given: Given, found: Options) -> Options:
        size, layers = _window(given, default), found["num_layers"]
        if switch and not given.flag("use_sliding_window", False):
            size = None
        kinds = given.config.get("layer_types")
        letters = usual(given, found, size is not None) if kinds is None else _letters(given, kinds, layers)
        if "w" not in letters:
            return {"window": 0, "window_layers": ""}
        if size is None:
            given.refuse("layer_types has sliding_attention, so the file needs sliding_window"
                         + " and use_sliding_window=true" * switch)
        return {"window": size, "window_layers": letters if "f" in letters else ""}

    def write(options: Options) -> dict[str, Any]:
        letters = per_layer(options["window_layers"], options["num_layers"], "w" if options["window"] else "f")
        letters = letters if options["window"] else "f" * len(letters)
        found = {
            "layer_types": [WINDOW if letter == "w" else FULL for letter in letters],
            "sliding_window": options["window"] or default,
        }
        return found | ({"use_sliding_window": "w" in letters} if switch else {}) | back(options)

    keys = ("sliding_window", "layer_types", *(("use_sliding_window",) if switch else ()), *more)
    return Field(keys, ("window", "window_layers"), read, write)


def _letters(given: Given, kinds: Any, layers: int) -> str:
    if not isinstance(kinds, list) or len(kinds) != layers:
        given.refuse(f"layer_types={short(kinds)} must be a list with the kind of each of the {layers} layers")
    if other := [kind for kind in kinds if not isinstance(kind, str) or kind not in LETTER]:
        given.refuse(f"layer_types has {short(other[0])}, but mpidp's Transformer supports only {' and '.join(LETTER)}")
    return "".join(LETTER[kind] for kind in kinds)


def every(period: int) -> Callable[[Given, Options, bool], str]:
    """Return a function for the argument `usual` of layered_window(). Every period-th layer gets full attention, and the other
    layers get the window."""
    return lambda given, found, has_window: per_layer("w" * (period - 1) + "f", found["num_layers"], "")


def every_in(key: str, default: int) -> Callable[[Given, Options, bool], str]:
    """Return a function for the argument `usual` of layered_window(). It works like every(), with the period from the field
    `key` of config.json. default: the period if the field is missing."""
    return lambda given, found, has_window: every(given.number(key, default=default, most=2**16))(given, found, has_window)


def above(key: str, default: int) -> Callable[[Given, Options, bool], str]:
    """Return a function for the argument `usual` of layered_window(). The field `key` of config.json contains the index of the
    first layer with a window. All later layers also have the window. default: the index if the field is missing."""

    def letters(given: Given, found: Options, has_window: bool) -> str:
        first = given.config.get(key, default)
        if type(first) is not int or first < 0:
            given.refuse(f"{key}={short(first)} must be an integer of at least 0")
        first = min(first, found["num_layers"]) if has_window else found["num_layers"]
        return "f" * first + "w" * (found["num_layers"] - first)

    return letters


def first_window(options: Options) -> dict[str, Any]:
    """Return the field max_window_layers of Qwen as {name: value}. The value is the number of layers before the first layer with
    a window. Pure."""
    letters = per_layer(options["window_layers"], options["num_layers"], "w")
    return {"max_window_layers": letters.index("w") if options["window"] and "w" in letters else options["num_layers"]}


def without_rotary(interval: int) -> Field:
    """Return the `Field` object of SmolLM3's fields `no_rope_layers` and `no_rope_layer_interval`. In no_rope_layers, a layer
    has the entry 1 if it has rotary positions, and otherwise 0. interval: the value of no_rope_layer_interval if this field is
    missing."""

    def read(given: Given, found: Options) -> Options:
        listed, layers = given.config.get("no_rope_layers"), found["num_layers"]
        if listed is None:
            period = given.number("no_rope_layer_interval", default=interval, most=2**31 - 1)
            letters = "".join("n" if (layer + 1) % period == 0 else "y" for layer in range(layers))
        elif not isinstance(listed, list) or len(listed) < layers or not all(type(one) in (int, bool) for one in listed):
            given.refuse(f"no_rope_layers={short(listed)} must be a list with 0 or 1 for each of the {layers} layers")
        else:
            letters = "".join("y" if one else "n" for one in listed[:layers])
        return {"rotary_layers": letters if "n" in letters else ""}

    def write(options: Options) -> dict[str, Any]:
        letters = per_layer(options["rotary_layers"], options["num_layers"], "y")
        return {"no_rope_layers": [int(letter == "y") for letter in letters], "no_rope_layer_interval": interval}

    return Field(("no_rope_layers", "no_rope_layer_interval"), ("rotary_layers",), read, write)


def windows_without_rotary(given: Given, found: Options, has_window: bool) -> str:
    """Return the letters of SmolLM3's layers, as layered_window() defines them. If the model has a window, only the layers
    without rotary positions use it. Use this function as the argument `usual` of layered_window()."""
    letters = per_layer(found["rotary_layers"], found["num_layers"], "y")
    return "".join("w" if has_window and letter == "n" else "f" for letter in letters)

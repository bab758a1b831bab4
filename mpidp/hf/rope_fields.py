"""Converts the fields of config.json for rotary positions to options, and back. It supports rope_parameters (transformers 5) and
rope_theta with rope_scaling (older versions). Pure, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

from mpidp.hf.fields import Field, Given, Options, head_size
from mpidp.hf.layers import FULL, WINDOW
from mpidp.model.rope_scaling import rope_scaling

OLD = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
KNOWN = {  # keys inside rope_parameters; a kind of scaling uses some of them
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "attention_factor",
    "long_factor", "short_factor", "finetuned",
}
KINDS = ("linear", "llama3", "yarn", "longrope")
MOST = 2.0**62


def rope(
    theta: float = 10000.0, theta_keys: tuple[str, ...] = ("rope_theta",), partial: float | None = None,
    partial_keys: tuple[str, ...] = ("partial_rotary_factor",), kinds: Mapping[str, str] | None = None, original: int = 0,
) -> Field:
    """Return the `Field` object of rotary positions, for a family in which all layers have the same rotary positions.

    theta: the base of the rotary frequencies, used if config.json does not state it. theta_keys: the names of the fields
    outside rope_parameters that may contain theta. If several of these fields are present, their values must be equal.
    partial: the fraction of a head's dimensions that is rotated, used if config.json does not state it. If `partial` is None,
    the family always rotates all dimensions. partial_keys: the names of the fields outside rope_parameters that may contain
    this fraction. kinds: {the family's name: mpidp's name} of each supported scaling. If `kinds` is None, all of mpidp's
    scalings are supported, under mpidp's names. original: the value of original_max_position_embeddings if this field is
    missing. If `original` is 0, the value is that of max_position_embeddings.
    """
    known = dict.fromkeys(KINDS) if kinds is None else kinds
    keys = tuple(dict.fromkeys((*theta_keys, *partial_keys, *OLD)))

    def read(given: Given, found: Options) -> Options:
        scaling = _object(given, "rope_scaling") or _object(given, "rope_parameters")  # as in transformers
        _check_keys(given, scaling, "rope_parameters")
        base = _first(given, scaling, "rope_theta", theta_keys, theta)
        share = _first(given, scaling, "partial_rotary_factor", partial_keys, 1.0 if partial is None else partial, 1.0)
        dims = int(head_size(found) * share)
        if partial is None and share != 1.0:
            given.refuse(f"partial_rotary_factor={share} is not supported, because this family rotates whole heads")
        if share != 1.0 and (dims < 2 or dims % 2 or dims > head_size(found)):
            given.refuse(f"partial_rotary_factor={share} of heads of size {head_size(found)} is not an even number of dimensions")
        _check_ignored(given, "rope_theta", theta_keys, base)
        _check_ignored(given, "partial_rotary_factor", partial_keys, share)
        outside = given.config.get("original_max_position_embeddings") or original
        text = scaling_text(given, scaling | ({"original_max_position_embeddings": outside} if outside else {}), known)
        return {"rope_theta": base, "rope_scaling": text, "rotary_dims": dims if dims < head_size(found) else 0}

    def write(options: Options) -> dict[str, Any]:
        made = scaling_object(options["rope_scaling"])
        share = {} if partial is None else {"partial_rotary_factor": _share(options)}
        found = dict.fromkeys(theta_keys, options["rope_theta"]) | dict.fromkeys(partial_keys if share else (), _share(options))
        if first := made.get("original_max_position_embeddings"):
            found["original_max_position_embeddings"] = first  # llama.cpp's converter and Phi-3 read it here
        return found | {
            "rope_theta": options["rope_theta"], "rope_scaling": made if options["rope_scaling"] else None,
            "rope_parameters": made | {"rope_theta": options["rope_theta"]} | share,
        }

    return Field(keys, ("rope_theta", "rope_scaling", "rotary_dims"), read, write)


def two_ropes(theta: float, window_theta: float, window_key: str | None = None) -> Field:
    """Return the `Field` object of rotary positions, for a family in which layers with a window have a theta and a scaling of
    their own.

    theta: theta of layers with full attention if config.json does not state it. window_theta: theta of layers with a window if
    config.json does not state it. window_key: the name of the field outside rope_parameters that may contain the theta of
    layers with a window, or None. In Family.fields, this Field must come after the Field of the windows.
    """

    def read(given: Given, found: Options) -> Options:
        both = _object(given, "rope_parameters")
        old = _object(given, "rope_scaling")
        if not both and old.get("type", "default") != "default" and not old.get("rope_type"):
            given.refuse(f"transformers ignores rope_scaling={short(old)} in this family, and uses no scaling, because this "
                         "object has no rope_type. If the scaling is right, write rope_type instead of type. Otherwise, "
                         "remove rope_scaling")
        if other := set(both) - {FULL, WINDOW}:
            given.refuse(f"rope_parameters has {short(min(other))}, but must have only {FULL} and {WINDOW}, one object each")
        parts = {}
        for kind in (FULL, WINDOW):
            part = both.get(kind)
            if part is not None and not isinstance(part, dict):
                given.refuse(f"rope_parameters of {kind} is {short(part)}, but must be an object")
            parts[kind] = dict(part or {}) | (old if kind == FULL else {})
            _check_keys(given, parts[kind], f"rope_parameters of {kind}")
            if parts[kind].get("truncate", True) is not True:
                given.refuse(f"truncate=false in rope_parameters of {kind} is not supported, because transformers ignores it")
            if parts[kind].get("partial_rotary_factor", 1.0) != 1.0 or given.config.get("partial_rotary_factor", 1.0) != 1.0:
                given.refuse("partial_rotary_factor is not supported, because this family rotates whole heads")
        bases = (
            _first(given, parts[FULL], "rope_theta", ("rope_theta",), theta),
            _first(given, parts[WINDOW], "rope_theta", (window_key,) if window_key else (), window_theta),
        )
        if window_key is None and parts[WINDOW].get("rope_theta") is None:
            _check_ignored(given, "rope_theta", (), bases[1])
        texts = [scaling_text(given, parts[kind], dict.fromkeys(KINDS)) for kind in (FULL, WINDOW)]
        same = bases[0] == bases[1] and texts[0] == texts[1] or not found["window"]
        return {
            "rope_theta": bases[0], "rope_scaling": texts[0], "window_rope_theta": 0.0 if same else bases[1],
            "window_rope_scaling": "" if same else texts[1],
        }

    def write(options: Options) -> dict[str, Any]:
        own = options["window_rope_theta"] > 0
        base = options["window_rope_theta"] if own else options["rope_theta"] if options["window"] else window_theta
        text = options["window_rope_scaling"] if own else options["rope_scaling"] if options["window"] else ""
        full, windowed = scaling_object(options["rope_scaling"]), scaling_object(text)
        return {
            "rope_theta": options["rope_theta"], "rope_scaling": full if options["rope_scaling"] else None,
            "rope_parameters": {
                FULL: full | {"rope_theta": options["rope_theta"]}, WINDOW: windowed | {"rope_theta": base},
            },
        } | ({window_key: base} if window_key else {})

    keys = (*OLD, *((window_key,) if window_key else ()))
    return Field(keys, ("rope_theta", "rope_scaling", "window_rope_theta", "window_rope_scaling"), read, write)


def _object(given: Given, key: str) -> dict[str, Any]:
    found = given.config.get(key)
    if found is not None and not isinstance(found, dict):
        given.refuse(f"{key}={short(found)} must be an object")
    return found or {}


def _check_keys(given: Given, scaling: Mapping[str, Any], where: str) -> None:
    if any(isinstance(value, dict) for value in scaling.values()):
        given.refuse(f"{where}={short(dict(scaling))} is not supported, because all layers must have the same rotary "
                     "parameters")
    if unknown := sorted(set(scaling) - KNOWN):
        given.refuse(f"{where} has {', '.join(map(short, unknown))}, which mpidp does not know")


def _first(
    given: Given, scaling: Mapping[str, Any], key: str, outside: tuple[str, ...], default: float, most: float = MOST
) -> float:
    """Return the value of `key` in `scaling`. If this key is missing, return the value of the fields in `outside`. If these
    fields are missing too, return `default`. scaling: the content of rope_parameters. most: the largest value that is
    accepted. Raises DataError if the fields in `outside` differ, or if the value is not accepted."""
    values = {name: given.config[name] for name in outside if given.config.get(name) is not None}
    if len(set(map(repr, values.values()))) > 1 and len({float(v) for v in values.values() if isinstance(v, (int, float))}) > 1:
        given.refuse(f"{' and '.join(f'{name}={short(value)}' for name, value in values.items())} contradict each other")
    value = scaling.get(key)
    value = next(iter(values.values()), default) if value is None else value
    return float(Given({key: value}, given.where).number(key, float, most=most))


def _check_ignored(given: Given, key: str, names: tuple[str, ...], used: float) -> None:
    """Raise DataError if transformers ignores the field `key` of config.json, and this field differs from `used`. names: the
    fields outside rope_parameters that transformers reads. used: the value that transformers uses."""
    if key not in names and given.config.get(key) is not None and given.config[key] != used:
        where = "this family" if names else "layers with a window of this family"
        given.refuse(
            f"transformers ignores {key}={short(given.config[key])} in {where}, and uses {used}. If {key} is right, write it "
            "into rope_parameters. Otherwise, remove it"
        )


def scaling_text(given: Given, scaling: Mapping[str, Any], kinds: Mapping[str, str | None]) -> str:
    """Return the option `rope_scaling`. scaling: the content of rope_parameters. kinds: {the family's name: mpidp's name, or
    None if both are equal} of each supported scaling. Raises DataError if the scaling is not supported, or if one of its
    values is missing or invalid. Pure."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return ""
    if not isinstance(kind, str) or kind not in kinds:
        fix = "The weights were trained with this scaling, so it cannot be left out"
        if kind == "dynamic":
            fix = ("This scaling changes nothing up to max_position_embeddings tokens. If model.seq_len is not above this "
                   "number, write \"default\" instead of \"dynamic\" in config.json in a copy of the folder, and keep rope_theta")
        given.refuse(f"rope scaling {short(kind)} is not supported, only {', '.join(kinds)}. {fix}")
    kind = kinds[kind] or kind
    try:
        text = f"{kind}:" + ",".join(f"{number:.17g}" for number in _NUMBERS[kind](scaling, given))
        rope_scaling(text)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError, IndexError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else f"invalid values ({error})"
        given.refuse(f"rope scaling {kind}: {missing}")
    return text


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{short(value)} is not a number")
    return float(value)


def _lengths(scaling: Mapping[str, Any], given: Given) -> tuple[float, float]:
    """Return (context length of the original training, maximum context length of the model)."""
    longest = given.number("max_position_embeddings")  # transformers has another default in each family
    return _float(scaling.get("original_max_position_embeddings") or longest), float(longest)


def _llama3(scaling: Mapping[str, Any], given: Given) -> list[float]:
    numbers = [_float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")]
    return [*numbers, _lengths(scaling, given)[0]]


def _yarn(scaling: Mapping[str, Any], given: Given) -> list[float]:
    original, longest = _lengths(scaling, given)
    factor = longest / original if scaling["factor"] is None else _float(scaling["factor"])
    if (attention := scaling.get("attention_factor")) is None:
        scales = [scaling.get("mscale"), scaling.get("mscale_all_dim")]
        numbers = [_float(one) for one in scales] if all(scales) else [1.0, 0.0]
        above, below = (1.0 if factor <= 1 else 0.1 * one * math.log(factor) + 1.0 for one in numbers)
        attention = above / below
    if _float(attention) <= 0:
        raise ValueError("attention_factor must be positive")
    fast, slow = _float(scaling.get("beta_fast") or 32), _float(scaling.get("beta_slow") or 1)
    return [factor, original, fast, slow, _float(attention), float(scaling.get("truncate", True) is True)]


def _longrope(scaling: Mapping[str, Any], given: Given) -> list[float]:
    original, longest = _lengths(scaling, given)
    factor = longest / original if scaling.get("factor") is None else _float(scaling["factor"])
    if (attention := scaling.get("attention_factor")) is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = [[_float(one) for one in scaling[key]] for key in ("short_factor", "long_factor")]
    if len(factors[0]) != len(factors[1]):
        raise ValueError("short_factor and long_factor differ in length")
    return [original, _float(attention), *factors[0], *factors[1]]


_NUMBERS: dict[str, Any] = {
    "linear": lambda scaling, given: [_float(scaling["factor"])], "llama3": _llama3, "yarn": _yarn, "longrope": _longrope,
}


def scaling_object(text: str) -> dict[str, Any]:
    """Return the content of rope_parameters without theta. text: the option `rope_scaling`. Pure."""
    found = rope_scaling(text)
    if found is None:
        return {"rope_type": "default"}
    original = int(found.original) if found.original % 1 == 0 else found.original
    kinds: dict[str, dict[str, Any]] = {
        "linear": {"factor": found.factor},
        "llama3": {
            "factor": found.factor, "low_freq_factor": found.low, "high_freq_factor": found.high,
            "original_max_position_embeddings": original,
        },
        "yarn": {
            "factor": found.factor, "original_max_position_embeddings": original, "beta_fast": found.high, "beta_slow": found.low,
            "attention_factor": found.attention, "truncate": found.truncate,
        },
        "longrope": {
            "original_max_position_embeddings": original, "attention_factor": found.attention,
            "short_factor": list(found.short), "long_factor": list(found.long),
        },
    }
    return {"rope_type": found.kind, **kinds[found.kind]}


def _share(options: Options) -> float:
    """Return the fraction of a head's dimensions that is rotated. It is rounded so that int(head size * fraction) is the number
    of rotated dimensions."""
    size = head_size(options)
    share = (options["rotary_dims"] or size) / size
    return share if int(size * share) == (options["rotary_dims"] or size) else math.nextafter(share, 2.0)

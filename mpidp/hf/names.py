"""Converts config.json to settings of the model, and back. It supports the families of families.py. Pure, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

from mpidp.errors import DataError, UsageError
from mpidp.hf.families import BY_ARCHITECTURE, BY_MODEL_TYPE, FAMILIES, FREE, ONLY, Family
from mpidp.hf.fields import Given, Options, head_size
from mpidp.hf.layers import per_layer, shortest
from mpidp.hf.refused import refusal
from mpidp.model.option_checks import option_problems
from mpidp.model.options import DEFAULTS
from mpidp.model.shape import TransformerShape, shapes_of

NOT_KEPT = ("transformers_version", "_name_or_path", "auto_map")  # auto_map names code in the folder
HEADS = ("model_dim", "num_heads", "num_kv_heads", "head_dim")


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """Return the family that a config.json names. Raises DataError if this family is not supported, or if the fields
    architectures and model_type name different families. Pure.

    where: the file's path. Errors name it.
    """
    named, kind = config.get("architectures"), config.get("model_type")
    listed = named if isinstance(named, list) and named else []
    of_name = next((BY_ARCHITECTURE[one] for one in listed if isinstance(one, str) and one in BY_ARCHITECTURE), None)
    of_kind = BY_MODEL_TYPE.get(kind) if isinstance(kind, str) else None
    found = of_name if listed else of_kind
    if found is None or (of_kind is None and kind is not None):
        raise DataError(f"{where}: {refusal(named, kind)}")
    if of_kind is not None and found is not of_kind:
        raise DataError(
            f"{where}: architectures={short(named)} and model_type={short(kind)} belong to different families, and transformers "
            "uses model_type. Correct the wrong field in a copy of the folder"
        )
    return found


def settings_of(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Return the settings `model.*` that a config.json describes, by name without this prefix. Pure.

    Raises DataError if a field is missing, is not known, or has a value that is not supported. where: the file's path.
    """
    family = family_of(config, where)
    _check_known(family, config, where)
    return _read(family, config, where)


def _check_known(family: Family, config: Mapping[str, Any], where: object) -> None:
    """Raise DataError if a field of config.json is not known, or does not have a supported value."""
    known = {*FREE, *family.free, *(key for one in family.fields for key in one.keys)}
    only = {**ONLY, **family.only}
    for key, values in only.items():
        fits = any(config.get(key) == one and type(config.get(key)) is type(one) for one in values)
        if key in config and key not in known and not fits:
            raise DataError(
                f"{where}: {key}={short(config[key])} is not supported. For {family.architecture}, mpidp supports only "
                f"{key}={' or '.join(map(repr, values))}"
            )
    if unknown := [key for key in config if key not in known and key not in only]:
        raise DataError(
            f"{where}: mpidp does not know {', '.join(f'{key}={short(config[key])}' for key in unknown[:5])} of "
            f"{family.architecture}, so the logits may be wrong. If transformers gives the same logits without "
            f"{'it' if len(unknown) == 1 else 'them'}, remove {'it' if len(unknown) == 1 else 'them'} in a copy of the folder"
        )


def _read(family: Family, config: Mapping[str, Any], where: object) -> dict[str, Any]:
    given, found = Given(config, where), {**DEFAULTS, **family.options, "rope_theta": 10000.0, "rope_scaling": "", "head_dim": 0}
    for one in family.fields:
        found |= one.read(given, found)
    heads, kv, dim = found["num_heads"], found["num_kv_heads"], found["model_dim"]
    if heads % kv or head_size(found) % 2 or (not found["head_dim"] and dim % heads):
        given.refuse(
            f"{heads} heads of size {head_size(found)} and {kv} key-value heads are invalid. The head size must be even, and the "
            f"number of heads must be a multiple of the number of key-value heads. Check {', '.join(_keys_of(family, *HEADS))}"
        )
    found = canonical(found)
    rows = found["position_rows"] or 1
    if problems := list(option_problems(shape_of(found, rows))):
        given.refuse("; ".join(problems))
    return found


def _keys_of(family: Family, *options: str) -> list[str]:
    """Return the names of the fields of config.json that determine the options `options`."""
    return [key for one in family.fields if set(one.options) & set(options) for key in one.keys]


def canonical(options: Options) -> Options:
    """Return equivalent options in a canonical form. In some options, 0 stands for a value that is computed from other
    options. If such an option equals this computed value, it becomes 0. Patterns with one letter per layer become as short as
    possible. Pure."""
    found = dict(options)
    size, layers = head_size(options), options["num_layers"]
    found["head_dim"] = 0 if size * options["num_heads"] == options["model_dim"] else size
    found["rotary_dims"] = 0 if options["rotary_dims"] == size else options["rotary_dims"]
    found["attention_scale"] = 0.0 if options["attention_scale"] == size**-0.5 else options["attention_scale"]
    letters = per_layer(options["window_layers"], layers, "w")
    if not options["window"] or "w" not in letters:
        found |= {"window": 0, "window_layers": "", "window_rope_theta": 0.0, "window_rope_scaling": ""}
    else:
        found["window_layers"] = shortest(letters) if "f" in letters else ""
    rotary = per_layer(options["rotary_layers"], layers, "y")
    found["rotary_layers"] = shortest(rotary) if "n" in rotary else ""
    if (options["window_rope_theta"], options["window_rope_scaling"]) == (options["rope_theta"], options["rope_scaling"]):
        found |= {"window_rope_theta": 0.0, "window_rope_scaling": ""}
    found["attention_bias"] = ",".join(name for name in "qkvo" if name in options["attention_bias"].replace(" ", "").split(","))
    return found


def shape_of(settings: Mapping[str, Any], seq_len: int = 1) -> TransformerShape:
    """Return the shape of a model with the settings that settings_of() returned. seq_len: the length of the context. Pure."""
    rest = {key: value for key, value in settings.items() if key != "head_dim"}
    return TransformerShape(seq_len=seq_len, head_size=settings["head_dim"], **rest)


def options_of(shape: TransformerShape) -> Options:
    """Return the settings of the model with this shape, as settings_of() would return them. Pure."""
    sizes = ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "model_dim", "hidden_dim", "tie_embeddings", "rope_theta",
             "rope_scaling", "norm_eps")
    found = {name: getattr(shape, name) for name in (*sizes, *DEFAULTS)}
    return canonical(found | {"head_dim": shape.head_dim, "position_rows": shape.table_rows})


def longest_of(config: Mapping[str, Any], where: object) -> int | None:
    """Return the maximum context length that config.json states. If config.json states none, return None. where: the file's
    path. Errors name it. Raises DataError if this length is not a positive integer, or if the family is not supported.
    Pure."""
    key = family_of(config, where).longest
    return None if config.get(key) is None else Given(config, where).number(key)


def config_of(
    shape: TransformerShape, dtype: str, ids: Mapping[str, int | None], before: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the contents of config.json for a model of this shape. dtype: the name of the dtype of its weights. Raises
    UsageError if no supported family has the options of the model. Pure.

    before: the contents of config.json of the model that this model was fine-tuned from, or an empty dict. If `before` is not
    empty, the result has the same family, and keeps the fields of `before` that do not contradict the model. If `before` is
    empty, the first family that has all options of the model is used. ids: values of bos_token_id, eos_token_id and
    pad_token_id, each used only if `before` lacks the field.
    """
    wanted = options_of(shape)
    if before:
        family = family_of(before, "config.json")
        kept = {key: value for key, value in before.items() if key not in NOT_KEPT}
        config = _written(family, shape, wanted, dtype, ids, kept)
        if missing := _differences(family, config, wanted):
            raise UsageError(f"the model has {_listed(missing)}, which {family.architecture} does not have")
        return config
    nearest: tuple[int, Family, Options] | None = None
    for family in FAMILIES:
        config = _written(family, shape, wanted, dtype, ids, {})
        missing = _differences(family, config, wanted)
        if not missing:
            return config
        if nearest is None or len(missing) < nearest[0]:
            nearest = len(missing), family, missing
    assert nearest is not None
    raise UsageError(
        f"no family of transformers has all options of this model. {nearest[1].architecture} is nearest, but does not have "
        f"{_listed(nearest[2])}"
    )


def _listed(options: Options) -> str:
    return ", ".join(f"model.{name}={value}" for name, value in options.items())


def _written(
    family: Family, shape: TransformerShape, options: Options, dtype: str, ids: Mapping[str, int | None], kept: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the contents of config.json for a model of this family. kept: the fields of an earlier config.json, or an empty
    dict. The result keeps the fields in `kept` that do not contradict the options."""
    usual: dict[str, Any] = {
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **ids, "initializer_range": 0.02, "use_cache": True,
        "attention_dropout": 0.0,
    }
    fixed: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    old = _old_options(family, kept)
    for one in family.fields:
        same = old and all(old[name] == options[name] for name in one.options)
        if not same or "rope_parameters" in one.keys:
            fixed |= one.write(options)
    found = usual | dict(kept) | fixed | {"dtype": dtype, "torch_dtype": dtype}
    longest = found.get(family.longest)
    if shape.positions == "rotary":
        found[family.longest] = max(longest if type(longest) is int else 0, shape.seq_len)
    return found | {old: found[new] for old, new in family.copies.items()}


def _old_options(family: Family, kept: Mapping[str, Any]) -> Options:
    """Return the options that the fields in `kept` describe. If the fields are not valid, return an empty dict."""
    try:
        return _read(family, kept, "config.json") if kept else {}
    except DataError:
        return {}


def _differences(family: Family, config: Mapping[str, Any], wanted: Options) -> Options:
    """Return the options in `wanted` that are missing from `config`, or have other values there. config: the contents of a
    config.json."""
    try:
        again = _read(family, config, "config.json")
    except DataError:
        again = {**wanted, **DEFAULTS, **family.options}
    return {name: value for name, value in wanted.items() if again.get(name) != value}


def sizes_of(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} for the parameters of a model. settings: the result of settings_of(). Pure."""
    return shapes_of(shape_of(settings, settings["position_rows"] or 1))

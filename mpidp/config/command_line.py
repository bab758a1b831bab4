"""Reads settings from a TOML file and from `--section.key=value` arguments. Also makes the help text of all settings.

An unknown key or value raises UsageError. Its message suggests the closest valid key or value. This module imports neither torch
nor MPI, so that errors are reported before MPI starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpidp.config.recipes import RECIPES
from mpidp.config.schema import Config, checked, fields_of
from mpidp.config.settings import FIXED
from mpidp.config.suggest import suggestion
from mpidp.data.text_files import read_whole
from mpidp.errors import DataError, UsageError
from mpidp.runtime.files import expand_home

MAX_TOML_BYTES = 2**24


def _nearest(word: str, words: Sequence[str]) -> str:
    return difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.0)[0]


def _convert(key: str, raw: Any, about: dataclasses.Field[Any], where: str) -> Any:
    """Return the value `raw` of the setting `key`, converted to the type of its field `about`. Raises UsageError if the value
    has another type, is not one of the choices, or exceeds a limit. `where`: the file or command line that contains the value,
    for error messages."""
    meta = about.metadata
    kind = {"int": int, "float": float, "bool": bool, "str": str}[str(about.type)]
    raw = 0 if meta["auto"] and raw == "auto" else raw
    try:
        if not isinstance(raw, (str, int, float)):
            raise ValueError
        if kind is bool:
            value: Any = {"true": True, "false": False}[str(raw).lower()]
        elif kind is str:
            value = str(raw).lower() if isinstance(raw, bool) or meta["choices"] and raw in ("True", "False") else str(raw)
            value = expand_home(value, f"{where}: {key}") if meta["unit"] == "path" else value
        elif isinstance(raw, bool):
            raise ValueError
        elif kind is int:
            number = float(raw)
            value = int(raw) if isinstance(raw, int) or str(raw).lstrip("+-").replace("_", "").isdigit() else int(number)
            if value != number and abs(number) < 2**53:
                raise ValueError
        else:
            value = float(raw)
            if value != value or value in (float("inf"), float("-inf")):
                raise ValueError
    except (ValueError, KeyError, OverflowError) as error:
        wanted = {int: "an integer" + " or auto" * meta["auto"], float: "a number", bool: "true or false", str: "a string"}[kind]
        raise UsageError(f"{where}: {key}={raw!r} must be {wanted}") from error
    if meta["choices"] and value not in meta["choices"]:
        near = _nearest(value, meta["choices"])
        raise UsageError(f"{where}: {key}={value!r} is not one of {', '.join(meta['choices'])}; did you mean {near!r}?")
    if (meta["low"] is not None and value < meta["low"]) or (meta["high"] is not None and value > meta["high"]):
        limits = f"at least {meta['low']}" if meta["high"] is None else f"from {meta['low']} to {meta['high']}"
        raise UsageError(f"{where}: {key}={value} must be {limits}")
    return value


def _assign(chosen: dict[str, Any], key: str, raw: Any, where: str) -> None:
    known = {name: about for name, about, _ in fields_of()}
    if key not in known:
        raise UsageError(f"{where}: unknown setting {key!r}; did you mean {suggestion(key, list(known))!r}? (--help lists all)")
    chosen[key] = _convert(key, raw, known[key], where)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the settings of a TOML file as {section.key: value}. The values are not checked. Raises UsageError if the file
    cannot be read."""
    try:
        tree = tomllib.loads(read_whole(path, MAX_TOML_BYTES, may_be_empty=True).replace("\r\n", "\n"))
    except (DataError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: cannot read this configuration file ({error})") from error
    flat: dict[str, Any] = {}
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise UsageError(f"{path}: {section!r} is outside a section; write [section] and key = value below it")
        flat.update({f"{section}.{key}": value for key, value in values.items()})
    return flat


def read_run_config(path: Path) -> dict[str, Any]:
    """Return the settings of a run's config.toml as {section.key: value}. Only the types of known settings are checked, because
    the run may be from another version of mpidp. Raises UsageError if a value has the wrong type. Independent."""
    types = {name: about.type for name, about, _ in fields_of()}
    flat = read_toml(path)
    for key, value in flat.items():
        found = {bool: "bool str", int: "int float", float: "float", str: "str"}.get(type(value), "")
        if isinstance(value, int) and abs(value) >= 2**63 or isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{path}: {key} is too large, or not a number")
        if types.get(key, "str") not in (found or "a list or table").split() and key in types:
            raise UsageError(f"{path}: {key}={value!r} must be of type {types[key]}")
    return flat


def from_args(arguments: Sequence[str]) -> Config:
    """Return the configuration that command-line arguments describe.

    `arguments`: at most one path of a .toml file, and settings as --section.key=value or --section.key value. These settings
    override the settings in the file. Raises UsageError if a key or a value is not valid, or if settings contradict each other.
    Independent."""
    chosen: dict[str, Any] = {}
    words = list(arguments)
    files = 0
    overrides: list[tuple[str, str]] = []
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            key, equals, raw = word[2:].partition("=")
            if not equals:
                if not words:
                    raise UsageError(f"command line: --{key} has no value; write --{key}=VALUE")
                raw = words.pop(0)
            overrides.append((key, raw))
        else:
            files += 1
            if files > 1:
                raise UsageError(f"command line: a second configuration file {word!r}; give only one")
            for key, value in read_toml(Path(word)).items():
                _assign(chosen, key, value, word)
    for key, raw in overrides:
        _assign(chosen, key, raw, "command line")
    given = tuple(sorted(chosen))  # a set would have another order on each rank
    chosen = RECIPES[chosen.get("model.recipe", "none")] | chosen
    sections: dict[str, dict[str, Any]] = {}
    for key, value in chosen.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return checked(Config(given=given).with_values(**sections))


def parse_with_settings(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Return (options, configuration). `parser` parses the options of the command. from_args() parses all other arguments. Raises
    UsageError if an argument is not valid."""
    options, settings = parser.parse_known_args(list(arguments))
    return options, from_args(settings)


def settings_help() -> str:
    """Return the help text of all settings. Each setting has a line with its key, default, meaning and unit. Pure."""
    lines = ["settings, given as --section.key=value (a setting with `*` must not change when a run resumes)"]
    for key, about, default in fields_of():
        meta = about.metadata
        star = "*" if meta["resume"] == FIXED else " "
        choices = f" ({', '.join(meta['choices'])})" if meta["choices"] else ""
        unit = f" [{meta['unit']}]" if meta["unit"] else ""
        lines.append(f" {star} {key:<22} {json.dumps(default):<16} {meta['text']}{choices}{unit}")
    return "\n".join(lines)

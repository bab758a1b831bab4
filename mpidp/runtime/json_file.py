"""Reads JSON files whose content is not trusted, for example because the disk may be damaged. A schema describes what a file must
contain.

A schema is a type: int, float, str, bool, None, Any, list[T], dict[str, T], a union of these types, or a TypedDict. An object may
have keys that its TypedDict does not name. A float may be written as an integer. Numbers must be finite, and integers must fit in
64 bits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NotRequired, Required, Union, get_args, get_origin, get_type_hints, is_typeddict

from mpidp.runtime.files import open_regular

MAX_BYTES = 1 << 30  # no file of a run is larger
MAX_DEPTH = 100  # deepest nesting of lists and objects; deeper nesting could exhaust the stack of recursive functions


def read_json(path: Path, schema: Any = dict, max_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON file, check it against the schema, and return its content. Raises OSError if the file cannot be read or is not
    a regular file. Raises ValueError if the content does not fit the schema, is not JSON, or has more than `max_bytes`.
    Independent."""
    with open_regular(path) as file:
        data = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)  # read(n) allocates n bytes at once
    if len(data) > max_bytes:
        raise ValueError(f"larger than {max_bytes:,} bytes")
    return parse_json(data, schema)


def parse_json(data: bytes | str, schema: Any = Any) -> Any:
    """Parse JSON, check it against the schema, and return the value. Raises ValueError if `data` is not JSON or does not fit the
    schema. Pure."""
    try:
        text = data.decode() if isinstance(data, bytes) else data
        value = json.loads(text)
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(value)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # fails if half of a surrogate pair is missing
    except UnicodeEncodeError:
        raise ValueError("a text with half of a surrogate pair") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    check_type(value, schema)
    return value


def read_json_lines(path: Path, schema: Any = dict) -> tuple[list[Any], int]:
    """Read a file of JSON lines. Return the values of the lines that fit the schema, and the number of other lines. An incomplete
    last line is not counted. Raises OSError if the file cannot be read. Independent."""
    with open_regular(path) as file:
        lines = file.read().split(b"\n")
    last = list(parse_json_lines(lines[-1:], schema))
    found = list(parse_json_lines(lines[:-1], schema))
    return found + last, sum(map(bool, lines[:-1])) - len(found)


def parse_json_lines(lines: Iterable[bytes | str], schema: Any = dict) -> Iterator[Any]:
    """Yield the value of each line that is JSON and fits the schema. Skip other lines. Pure."""
    for line in lines:
        with suppress(ValueError):
            yield parse_json(line, schema)


def check_type(value: Any, schema: Any, place: str = "") -> None:
    """Raise ValueError if `value` does not fit the schema. `place`: the position of the value in the file, for error messages.
    Pure."""
    if schema is Any:
        return None
    kind, arguments = get_origin(schema), get_args(schema)
    if kind in (Union, UnionType):
        return _check_union(value, arguments, place)
    if is_typeddict(schema):
        return _check_object(value, schema, place)
    if kind is list and isinstance(value, list):
        for i, one in enumerate(value):
            check_type(one, arguments[0], f"{place}[{i}]")
        return None
    if kind is dict and isinstance(value, dict):
        for key, one in value.items():
            check_type(one, arguments[1], f"{place}.{key}" if place else key)
        return None
    if not _is_plain(value, kind or schema):
        raise ValueError(f"{place or 'the content'} is {_shown(value)}, but must be {_name(schema)}")


def _is_plain(value: Any, kind: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return kind in (int, float) and -(2**63) <= value < 2**63
    if isinstance(value, float):
        return kind is float and math.isfinite(value)
    return kind in (str, bool, NoneType, None, dict, list) and isinstance(value, NoneType if kind is None else kind)


def _check_union(value: Any, kinds: tuple[Any, ...], place: str) -> None:
    problem = ValueError("")
    for kind in kinds:
        try:
            return check_type(value, kind, place)
        except ValueError as error:
            problem = error
    if isinstance(value, (dict, list)) and value:
        raise problem  # this error names the wrong value inside the list or object
    raise ValueError(f"{place or 'the content'} is {_shown(value)}, but must be {' or '.join(map(_name, kinds))}")


def _check_object(value: Any, schema: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place or 'the content'} is {_shown(value)}, but must be an object")
    for key, (kind, required) in _keys(schema).items():
        where = f"{place}.{key}" if place else key
        if key in value:
            check_type(value[key], kind, where)
        elif required:
            raise ValueError(f"{where} is missing")


@cache
def _keys(schema: Any) -> dict[str, tuple[Any, bool]]:
    """Return {key: (type, whether the key is required)} of a TypedDict."""
    plain, marked = get_type_hints(schema), get_type_hints(schema, include_extras=True)
    required = {Required: True, NotRequired: False}
    return {key: (kind, required.get(get_origin(marked[key]), key in schema.__required_keys__)) for key, kind in plain.items()}


def _check_depth(value: Any, left: int = MAX_DEPTH) -> None:
    if isinstance(value, (dict, list)):
        if not left:
            raise ValueError(f"lists or objects are nested more than {MAX_DEPTH} deep")
        for one in value.values() if isinstance(value, dict) else value:
            _check_depth(one, left - 1)


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _name(schema: Any) -> str:
    kind = get_origin(schema) or schema
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", list: "a list", dict: "an object"}
    return "an object" if is_typeddict(schema) else names.get(kind, "null")

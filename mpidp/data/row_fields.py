"""Functions for the fields of a row. They parse values, and write names of fields as messages show them. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

MAX_NAME = 40  # characters of a name that are shown


class RowSkipped(ValueError):  # noqa: N818
    """A row cannot be used. `kind`: the counter in data_tools.counts.Counts that counts this row."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def field_of(fields: Mapping[str, Any], key: str, kind: type) -> Any:
    """Return the value of the field `key`. If the value is a string, it is parsed as JSON. Return None if the field is absent,
    null or "". Raises RowSkipped if the value is not of type `kind`, or if the string is not JSON."""
    value = fields.get(key) if fields.get(key) != "" else None
    value = parsed_field(key, value) if isinstance(value, str) else value
    if value is not None and not isinstance(value, kind):
        raise RowSkipped("malformed", f"`{key}` is {describe(value)}, not {describe(kind())}")
    return value


def objects_of(fields: Mapping[str, Any], key: str) -> list[Any] | None:
    """Return the value of the field `key`, which must be a list of objects. The list, and each object in the list, may be
    given as a JSON string. Return None if the field is absent, null or "". Raises RowSkipped if the value is not a list of
    objects."""
    found: list[Any] | None = field_of(fields, key, list)
    found = found and [parsed_field(key, one) if isinstance(one, str) else one for one in found]
    if not all(isinstance(one, dict) for one in found or []):
        raise RowSkipped("malformed", f"`{key}` is not a list of objects")
    return found


def parsed_field(key: str, text: str) -> Any:
    """Parse the JSON text of a field and return its value. `key`: the name of the field. Raises RowSkipped if the text is not
    JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowSkipped("malformed", f"`{key}` is a string that is not JSON") from None


def describe(value: Any) -> str:
    """Return a phrase for the type of a JSON value, for example "a list". Pure."""
    nouns = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return nouns.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def keys_of(names: Iterable[str], shown: int = 12) -> str:
    """Return a text that lists names of fields, separated by commas. `shown`: the maximum number of names. Pure."""
    found = [shown_name(name) for name in names]
    return ", ".join(found[:shown]) + (", ..." if found[shown:] else "") or "none"


def any_of(names: Collection[str]) -> str:
    """Return a text that lists names of fields, joined by "or". Pure."""
    return " or ".join(f"`{name}`" for name in names)


def shown_name(name: str) -> str:
    """Return the name of a field for a message. It is shortened, and control characters are escaped. Pure."""
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in name[:MAX_NAME])
    return printable if len(name) <= MAX_NAME else f"{printable}..."

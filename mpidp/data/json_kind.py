"""Detects how a .json file stores rows: as one object per line, as an array of objects, or not at all. Independent."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, BinaryIO

from mpidp.data.row_fields import any_of
from mpidp.data.unpack import MARK, lines_of

BEGIN_BYTES = 2**20  # length of the part of a file that is read; in most files, it contains the first object


def json_kind(stream: BinaryIO, wanted: Collection[str]) -> tuple[str, str]:
    """Return (kind, reason) of a JSON file. `kind`: "lines" for one object per line, "array" for an array of objects, or "text"
    if the file has no rows. `reason`: why the file has no rows, or "" if it has rows. Independent.

    `wanted`: names of fields. If a file has only one object, this object must have one of these fields. If a file has an array,
    the first object of the array must have one of these fields. If `wanted` is empty, any object is accepted.
    """
    lines = _begin(stream)
    first, begun = lines[0], b"".join(lines).strip()
    if begun.startswith(b"["):
        return _of_array(begun[1:].lstrip(), wanted) if len(lines) < 2 or not _is_json(first) else (
            "text", "JSON with a list on each line instead of an object")
    value = parse_object(first)
    if value is None or (len(lines) > 1 and parse_object(lines[1]) is None):
        return "text", "JSON with neither one object per line nor an array of objects"
    if len(lines) == 1 and wanted and not value.keys() & set(wanted):
        return "text", f"one JSON object without a field {any_of(wanted)}"
    return "lines", ""


def parse_object(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line, or None if the line is not a JSON object. Pure."""
    try:
        value = json.loads(line.removeprefix(MARK))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _begin(stream: BinaryIO) -> list[bytes]:
    """Return the first non-blank lines of a file: at least two lines, with at least BEGIN_BYTES bytes in total. If the file
    has less, return all its non-blank lines."""
    found: list[bytes] = []
    size = 0
    for line in lines_of(stream):
        if line is None or line.strip():
            found.append(line or b"")
            size += len(found[-1])
        if len(found) > 1 and size >= BEGIN_BYTES:
            break
    return found or [b""]


def _of_array(begun: bytes, wanted: Collection[str]) -> tuple[str, str]:
    """Return the result of json_kind() for an array. `begun`: the beginning of the array, without the opening bracket."""
    if not begun.startswith(b"{"):
        return "text", "a JSON array whose items are not objects"
    try:
        item, _ = json.JSONDecoder().raw_decode(begun.decode(errors="replace"))
    except (ValueError, RecursionError):
        return "array", ""  # the object is longer than `begun`, or malformed; the reader of the rows reports which
    if wanted and not item.keys() & set(wanted):
        return "text", f"a JSON array of objects without a field {any_of(wanted)}"
    return "array", ""


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True

"""Reads the rows of a file. The file contains JSON lines or a JSON array, or is a .csv, .tsv, .parquet or .arrow file.
Independent."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from mpidp.data.record_batches import WITH_COLUMNS, reading_columns, record_batches
from mpidp.data.row_fields import describe
from mpidp.data.text_files import TextFile
from mpidp.data.unpack import MARK, MAX_ROW_BYTES, lines_of, reading
from mpidp.errors import DataError


@dataclass(frozen=True)
class Row:
    """A row of a file. `fields`: {name: value}, or None if the row is malformed. `reason`: why the row is malformed, or "" if
    it is not."""

    path: str
    unit: str  # what `number` counts: line, item or row
    number: int  # counted from 1
    fields: dict[str, Any] | None
    reason: str = ""
    bad_utf8: bool = False  # whether bytes that are not UTF-8, or unpaired surrogates, were replaced

    @property
    def place(self) -> str:
        """Where the row is: FILE:LINE, or FILE and the number of the item or row."""
        return f"{self.path}:{self.number}" if self.unit == "line" else f"{self.path}: {self.unit} {self.number}"


def records(file: TextFile, columns: Collection[str] = (), surrogates: bool = False) -> Iterator[Row]:
    """Yield the rows of a file of kind lines, array, table, parquet or arrow. Blank lines are skipped. Independent.

    `columns`: the columns to read from a .parquet or .arrow file. If it is empty, all columns are read. `surrogates`: True to
    keep unpaired surrogates, False to replace them. Raises DataError if the file cannot be read, and UsageError if a library is
    missing.
    """
    kinds = {"lines": _lines, "array": _array, "table": _table}
    with reading(file.path):
        found = _columns(file, columns) if file.kind in WITH_COLUMNS else kinds[file.kind](file)
        unit = {"lines": "line", "array": "item"}.get(file.kind, "row")
        for number, value, reason, bad in found:
            if not reason and not isinstance(value, dict):
                reason = f"not an object but {describe(value)}"
            if reason:
                yield Row(file.path, unit, number, None, reason, bad)
            else:
                try:
                    cleaned, had_surrogates = (value, False) if surrogates else without_surrogates(value)
                except RecursionError:
                    yield Row(file.path, unit, number, None, "its lists or objects are nested too deeply", bad)
                else:
                    yield Row(file.path, unit, number, cleaned, "", bad or had_surrogates)


def decoded(raw: bytes) -> tuple[str, bool]:
    """Decode UTF-8. Return (text, whether invalid bytes were replaced). Pure."""
    try:
        return raw.decode(), False
    except UnicodeDecodeError:
        return raw.decode(errors="replace"), True


def without_surrogates(value: Any) -> tuple[Any, bool]:
    """Replace unpaired surrogates in all strings of a JSON value. Return (new value, whether anything was replaced). Pure."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode(errors="surrogatepass").decode(errors="replace"), True
        return value, False
    if isinstance(value, list):
        found = [without_surrogates(one) for one in value]
        return [one for one, _ in found], any(bad for _, bad in found)
    if isinstance(value, dict):
        pairs = [(without_surrogates(key), without_surrogates(one)) for key, one in value.items()]
        return {key: one for (key, _), (one, _) in pairs}, any(a or b for (_, a), (_, b) in pairs)
    return value, False


Found = tuple[int, Any, str, bool]  # number, value, reason, whether bytes were replaced


def _lines(file: TextFile) -> Iterator[Found]:
    with file.open() as stream:
        for number, line in enumerate(lines_of(stream), 1):
            if line is None:
                yield number, None, f"longer than {MAX_ROW_BYTES:,} bytes; put the text into a text file of its own", False
            elif line.strip():
                yield (number, *_parsed(line))


def _parsed(raw: bytes) -> tuple[Any, str, bool]:
    text, replaced = decoded(raw.removeprefix(MARK))
    try:
        return json.loads(text), "", replaced
    except (ValueError, RecursionError) as error:
        return None, f"not valid JSON ({error})", replaced


def _array(file: TextFile) -> Iterator[Found]:
    with file.open() as stream:
        raw = stream.read(MAX_ROW_BYTES + 1)
    if len(raw) > MAX_ROW_BYTES:
        raise DataError(f"{file.path} is a JSON array of more than {MAX_ROW_BYTES:,} bytes, too large to be read at once. "
                        "Write one object per line instead: jq -c '.[]' FILE.json > FILE.jsonl")
    found, reason, replaced = _parsed(raw)
    if reason:
        yield 1, None, f"begins as a JSON array, but is {reason}", False
        return
    # surrogateescape keeps invalid bytes, so `exact` differs from `found` in exactly those rows in which bytes were replaced
    exact = json.loads(raw.removeprefix(MARK).decode(errors="surrogateescape")) if replaced else found
    yield from ((n, value, "", value != given) for n, (value, given) in enumerate(zip(found, exact, strict=True), 1))


def _table(file: TextFile) -> Iterator[Found]:
    before, line = csv.field_size_limit(MAX_ROW_BYTES), 0
    try:
        with file.open() as stream, io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline="") as text:
            rows = csv.reader(text, delimiter=file.separator, strict=True)
            names = next(rows, [])
            for number, row in enumerate(rows, 1):
                line = rows.line_num
                if row:
                    reason = "" if len(row) == len(names) else f"{len(row)} values, but the header has {len(names)} names"
                    cleaned = [decoded(value.encode("utf-8", "surrogateescape")) for value in row]
                    fields = {name: value for name, (value, _) in zip(names, cleaned, strict=False)}
                    yield number, fields, reason, any(bad for _, bad in cleaned)
    except csv.Error as error:
        raise DataError(
            f"{file.path}: the table is not valid after line {line or 1} ({error}). Correct it, or write one JSON object per line"
        ) from None
    finally:
        csv.field_size_limit(before)


def _columns(file: TextFile, columns: Collection[str]) -> Iterator[Found]:
    number = 0
    with reading_columns(file.path, file.kind):
        for batch in record_batches(file.path, file.kind, columns):
            read = {name: _values(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
            for i in range(batch.num_rows):
                number += 1
                pairs = {name: _as_text(column[i].as_py()) for name, column in read.items()}
                bad = any(replaced for _, replaced in pairs.values())
                yield number, {name: value for name, (value, _) in pairs.items()}, "", bad


def _values(column: Any) -> Any:
    """Return the column with all strings cast to bytes. For a string that is not UTF-8, pyarrow would otherwise raise an
    exception."""
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)

    def as_bytes(kind: Any) -> Any:
        if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            return pyarrow.large_binary()
        if types.is_list(kind) or types.is_large_list(kind):
            return pyarrow.large_list(kind.value_field.with_type(as_bytes(kind.value_type)))
        if types.is_struct(kind):
            return pyarrow.struct([one.with_type(as_bytes(one.type)) for one in (kind.field(i) for i in range(kind.num_fields))])
        return kind

    return column.cast(as_bytes(column.type))


def _as_text(value: Any) -> tuple[Any, bool]:
    """Decode all bytes objects in a value. Return (decoded value, whether invalid bytes were replaced).

    Keys with the value null are removed from objects. Arrow stores null for keys that an object does not have.
    """
    if isinstance(value, bytes):
        return decoded(value)
    if isinstance(value, list):
        found = [_as_text(one) for one in value]
        return [one for one, _ in found], any(bad for _, bad in found)
    if isinstance(value, dict):
        pairs = {key: _as_text(one) for key, one in value.items() if one is not None}
        return {key: one for key, (one, _) in pairs.items()}, any(bad for _, bad in pairs.values())
    return value, False

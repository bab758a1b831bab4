"""Files of one item a line, read with suspicion: every fault is named by file and line. Pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpidp.errors import DataError


def read_text(path: str | Path) -> str:
    """DataError for what is no text file, or an empty one. Independent."""
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give a text file in UTF-8") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None
    if not text:
        raise DataError(f"{path} is empty")
    return text


def read_rows(path: str | Path, wanted: str) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line of a .jsonl that is not blank. wanted: an example of a row, for DataErrors.
    Independent."""
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); each line is an object like {wanted}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not an object; each line is one like {wanted}")
        found.append((number, row))
    if not found:
        raise DataError(f"{path} has only blank lines; each line is an object like {wanted}")
    return found


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Of a .jsonl its rows, each with a text `prompt` and whatever else; of any other file one prompt a line. Blank lines are
    passed over. DataError. Independent."""
    if Path(path).suffix == ".jsonl":
        rows = read_rows(path, '{"prompt": "Once upon"}')
        for number, row in rows:
            if not isinstance(row.get("prompt"), str):
                raise DataError(f'{path}, line {number}: no text "prompt", but {", ".join(row) or "nothing"}')
        return [row for _, row in rows]
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    found = [{"prompt": line} for line in lines if line.strip()]
    if not found:
        raise DataError(f"{path} has only blank lines; each line is a prompt")
    return found

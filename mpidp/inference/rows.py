"""Read and validate text files and .jsonl files. Errors name the file and line. Pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpidp.errors import DataError


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file. Raises DataError if it cannot be read, is not UTF-8, or is empty. Independent."""
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; a UTF-8 text file is needed") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): convert it to UTF-8 first") from None
    if not text:
        raise DataError(f"{path} is empty")
    return text


def read_rows(path: str | Path, wanted: str) -> list[tuple[int, dict[str, Any]]]:
    """Return (line number from 1, object) for each nonblank line of a .jsonl file. wanted: an example row, for error messages.

    Raises DataError if the file cannot be read or a line is not a JSON object. Independent.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); each line is an object like {wanted}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not an object; each line is an object like {wanted}")
        found.append((number, row))
    if not found:
        raise DataError(f"{path} has only blank lines; each line must be an object like {wanted}")
    return found


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Read prompts. A row of a .jsonl file has a string "prompt" and any other keys. A line of another file is a prompt.

    Blank lines are skipped. Raises DataError if the file cannot be read, or a row has no prompt. Independent.
    """
    if Path(path).suffix == ".jsonl":
        rows = read_rows(path, '{"prompt": "Once upon"}')
        for number, row in rows:
            if not isinstance(row.get("prompt"), str):
                raise DataError(f'{path}, line {number}: no string "prompt"; its keys are: {", ".join(row) or "none"}')
        return [row for _, row in rows]
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    found = [{"prompt": line} for line in lines if line.strip()]
    if not found:
        raise DataError(f"{path} has only blank lines; each line must be a prompt")
    return found

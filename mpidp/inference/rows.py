"""Reads the input files of the commands evaluate and generate: texts, prompts and questions. Error messages name the file and
the line. Independent."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpidp.data.records import Row, records
from mpidp.data.row_fields import keys_of
from mpidp.data.text_files import NotText, TextFile, read_whole, recognize
from mpidp.errors import DataError
from mpidp.inference.published_rows import prompt_of
from mpidp.runtime.log import log

PROMPT = '{"prompt": "Once upon"}'
OUTPUTS = ("text", "tokens", "ended")  # the fields that generate adds to a row


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file, which may be compressed. Independent.

    Raises DataError if the file cannot be read, is not UTF-8, is empty, or contains rows.
    """
    if (file := recognized(path)).kind != "text":
        raise DataError(f"{path} holds rows, but one text is needed. Prepare shards from the file with mpidp prepare, and "
                        "evaluate the shards with --data. For rows of chats or instructions, add --format chat to mpidp prepare")
    _warn(file)
    return read_whole(path)


def read_rows(path: str | Path, wanted: str) -> list[Row]:
    """Return the rows of a file. All kinds of files that text_files.py recognizes are supported, except plain text. A file
    that looks like plain text is read as JSON lines. wanted: an example of a valid row. Errors quote it.

    Raises DataError if the file cannot be read or is empty, or if a row is malformed. Independent.
    """
    file = recognized(path)
    if file.kind == "text":
        file = TextFile(file.path, "lines", file.skip)
    found = []
    for row in records(file, surrogates=True):
        if row.fields is None or row.bad_utf8:
            reason = row.reason or "not valid UTF-8"
            raise DataError(f"{path}, {row.unit} {row.number}: {reason}. Each {row.unit} must be an object like {wanted}")
        found.append(row)
    if not found:
        raise DataError(f"{path} has only blank lines. Each line must be an object like {wanted}")
    return found


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a file of prompts, each with a string in the field "prompt". A row in the format of Alpaca or Dolly
    gets this field. Other fields are kept. In a text file, each line is a prompt.

    Blank lines are skipped. Raises DataError if the file cannot be read, or if a row has no prompt. Independent.
    """
    if (file := recognized(path)).kind != "text":
        prompts = []
        for row in read_rows(path, PROMPT):
            try:
                prompts.append(prompt_of(row.fields or {}))
            except DataError as error:
                raise DataError(f"{path}, {row.unit} {row.number}: {error}") from None
            if not isinstance(prompts[-1].get("prompt"), str):
                keys = keys_of(row.fields or {})
                raise DataError(f'{path}, {row.unit} {row.number}: "prompt" is missing or not a string; the keys are {keys}')
        return set_apart(prompts, path)
    if Path(path).name.lower().partition(".")[2].startswith("json"):
        raise DataError(f"{path} is {file.doubt}. Each line must be an object like {PROMPT}")
    _warn(file)
    lines = [line.removesuffix("\r") for line in read_whole(path).split("\n")]
    found = [{"prompt": line} for line in lines if line.strip()]
    if not found:
        raise DataError(f"{path} has only blank lines. Each line must be a prompt")
    return found


def recognized(path: str | Path) -> TextFile:
    """Return a `TextFile` object, which states what kind of text or rows the file contains. Raises DataError if the file cannot
    be read as text. Independent."""
    try:
        return recognize(path)
    except NotText as error:
        raise DataError(f"{path} {error}") from None


def _warn(file: TextFile) -> None:
    if file.doubt:
        log.warning("warning: %s is read as plain text (%s)", file.path, file.doubt)


def set_apart(rows: list[dict[str, Any]], path: str | Path) -> list[dict[str, Any]]:
    """Return the rows, with new names for fields that are named like a field of the output. For example, text becomes
    prompt_text. Log a warning about the new names. path: the file of the rows, for the warning. Independent."""
    renamed: dict[str, str] = {}
    for name in OUTPUTS:
        if any(name in row for row in rows):
            renamed[name] = f"prompt_{name}"
            while any(renamed[name] in row for row in rows):
                renamed[name] = f"prompt_{renamed[name]}"
    if renamed:
        log.warning("warning: %s has fields with the same names as fields of the output. In the output, these fields are "
                    "named %s", path, ", ".join(f"{new} (was {old})" for old, new in renamed.items()))
    return [{renamed.get(name, name): value for name, value in row.items()} for row in rows]


def warn_of_names(found: Iterable[tuple[str, int]], what: str) -> None:
    """Log a warning if texts contain names of special tokens that are encoded as plain text. found: results of
    Encoder.named(), one per group of texts. what: what the texts are, for example "prompts", for the warning. Independent."""
    named = [(name, count) for name, count in found if count]
    if named:
        log.warning("warning: %d %s contain the name of a special token (%s), which is encoded as text. With "
                    "--special=tokens, it becomes the id of the token",
                    sum(count for _, count in named), what, named[0][0])

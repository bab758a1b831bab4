"""Reads the JSON files and the chat templates in a model's folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from mpidp.errors import DataError
from mpidp.runtime.files import open_regular
from mpidp.runtime.json_file import read_json

MAX_BYTES = 64 * 2**20  # largest file that is read or copied
MAX_TEMPLATE_BYTES = 2**20
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"  # a file, and a folder of .jinja files


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DataError if the file does not exist or is invalid. Independent."""
    if (found := optional_object(path)) is None:
        raise DataError(f"{path}: cannot be read ({os.strerror(errno.ENOENT)})")
    return found


def optional_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object. Return None if the file does not exist. Raises DataError if the file is invalid. Independent."""
    try:
        found: dict[str, Any] = read_json(path, dict, MAX_BYTES)
        return found
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise DataError(f"{path} is not a valid JSON object ({error}). Correct or remove the file") from None


def chat_templates_of(folder: Path) -> dict[str, str]:
    """Return the chat templates in a folder, as {name: text}. The template "tool_use" is for chats with tools, and "default"
    is for other chats. Independent.

    The templates come from the first source that exists: the files chat_template.jinja and
    additional_chat_templates/tool_use.jinja; the entry `chat_template` of tokenizer_config.json; the entry `chat_template` of
    chat_template.json. Raises DataError if a file cannot be read.
    """
    files = {"default": folder / TEMPLATE, "tool_use": folder / TEMPLATES / "tool_use.jinja"}
    if found := {name: read_template(file) for name, file in files.items() if file.exists()}:
        return found
    for name in ("tokenizer_config.json", "chat_template.json"):
        stored = (optional_object(folder / name) or {}).get("chat_template")
        if isinstance(stored, list):
            stored = {str(one.get("name")): one.get("template") for one in stored if isinstance(one, dict)}
        if stored is not None:
            stored = stored if isinstance(stored, dict) else {"default": stored}
            return {name: text for name, text in stored.items() if isinstance(text, str)}
    return {}


def read_template(path: Path) -> str:
    """Read a chat template from a file. Raises DataError if the file cannot be read. Independent."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
        if len(data) > MAX_TEMPLATE_BYTES:
            raise DataError(f"{path} is larger than {MAX_TEMPLATE_BYTES} bytes, so it is not a chat template")
        return data.decode()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Give an existing file with --chat-template") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text, so it is not a chat template") from None

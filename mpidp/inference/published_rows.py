"""Rows of ShareGPT, Alpaca and Dolly as prompts and chats, for generate and chat. Their answers are left out. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpidp.data.row_fields import RowSkipped
from mpidp.data.row_forms import INSTRUCTIONS, LISTS, UNWANTED, as_messages, as_pair
from mpidp.errors import DataError


def chat_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with `messages`, which do not end with an answer, for a row of a published form; other rows as they are.
    Raises DataError for a malformed row. Pure."""
    if row.get("prompt") is not None:
        return dict(row)
    try:
        found, form = as_messages(_answered(row))
    except RowSkipped as error:
        raise _refusal(error) from None
    messages = found.get("messages")
    if messages is None:
        return dict(row)
    if form and messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    return {**row, "messages": messages, **{key: found[key] for key in ("tools",) if key in found}}


def prompt_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with `prompt`, which is that of prepare --format prompt_completion, for a row of instructions; other rows as
    they are. Raises DataError for a malformed row, and for a row with messages. Pure."""
    if row.get("prompt") is not None:
        return dict(row)
    if key := next((name for name in LISTS if row.get(name) is not None), ""):
        raise DataError(f"`{key}` holds messages: they need a chat template (generate --chat, or chat --messages)")
    try:
        found, form = as_pair(_answered(row))
    except RowSkipped as error:
        raise _refusal(error) from None
    return {**row, "prompt": found["prompt"]} if form else dict(row)


def _refusal(error: RowSkipped) -> DataError:
    """Return the error of prepare in the words of generate and chat."""
    said = str(error).replace("trains on text only", "reads text only")
    return DataError(said.replace("use --format chat", "it needs a chat template (generate --chat)"))


def _answered(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with an answer, if it has instructions: an answer may be missing here."""
    found = {key: value for key, value in row.items() if key not in (*UNWANTED, "chosen", "rejected")}
    forms = [*INSTRUCTIONS.values()]
    names = next((one for place in (2, 1) for one in forms if one[place] in row), forms[0])
    return found | {names[2]: "-"} if names[0] in row else found

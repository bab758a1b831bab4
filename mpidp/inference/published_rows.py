"""Converts rows of ShareGPT, Alpaca and Dolly to prompts and chats, for the commands generate and chat. Answers in the rows are
left out. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpidp.data.row_fields import RowSkipped
from mpidp.data.row_forms import INSTRUCTIONS, LISTS, UNWANTED, as_messages, as_pair
from mpidp.errors import DataError


def chat_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row in a published format as a row with the field `messages`, without the last answer. Return a copy of any
    other row. Raises DataError if the row is malformed. Pure."""
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
    """Return a row with an instruction (Alpaca, Dolly) as a row with the field `prompt`. The prompt is the same as with
    prepare --format prompt_completion. Return a copy of any other row. Raises DataError if the row is malformed, or if it has
    messages. Pure."""
    if row.get("prompt") is not None:
        return dict(row)
    if key := next((name for name in LISTS if row.get(name) is not None), ""):
        raise DataError(f"`{key}` holds messages, which need a chat template (generate --chat, or chat --messages)")
    try:
        found, form = as_pair(_answered(row))
    except RowSkipped as error:
        raise _refusal(error) from None
    return {**row, "prompt": found["prompt"]} if form else dict(row)


def _refusal(error: RowSkipped) -> DataError:
    """Return a `DataError` whose message fits the commands generate and chat. error: an error whose message is written for the
    command prepare."""
    said = str(error).replace("trains on text only", "reads text only")
    return DataError(said.replace("--format chat", "a chat template (generate --chat)"))


def _answered(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the row without fields that mark it as unwanted or as a preference. If the row has an instruction, its
    answer becomes the placeholder "-", because the answer may be missing."""
    found = {key: value for key, value in row.items() if key not in (*UNWANTED, "chosen", "rejected")}
    forms = [*INSTRUCTIONS.values()]
    names = next((one for place in (2, 1) for one in forms if one[place] in row), forms[0])
    return found | {names[2]: "-"} if names[0] in row else found

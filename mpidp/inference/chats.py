"""Reads chats and converts them to prompts. The run's chat template renders a prompt, which ends where the assistant's answer
begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpidp.data.chat_template import BEGIN, END, Template, TemplateRejection
from mpidp.data.row_fields import RowSkipped, field_of, objects_of
from mpidp.data.special_tokens import SpecialTokens
from mpidp.errors import DataError, UsageError
from mpidp.inference.published_rows import chat_of
from mpidp.inference.rows import read_prompts, read_rows, recognized, set_apart

EXAMPLE = '{"messages": [{"role": "user", "content": "Why?"}]}'


def read_chats(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a file of chats. A row has the key "messages" or "prompt" with a list of messages. The value of
    "prompt" can also be the text of one user message. Rows in the formats of ShareGPT, Alpaca and Dolly are also accepted. In a
    text file, each line is one user message.

    Raises DataError if the file cannot be read, or if a row has none of these forms. Independent.
    """
    if recognized(path).kind == "text":
        return read_prompts(path)
    found = []
    for row in read_rows(path, EXAMPLE):
        try:
            found.append(chat_of(row.fields or {}))
            messages_of(found[-1])
        except DataError as error:
            raise DataError(f"{path}, {row.unit} {row.number}: {error}. Each {row.unit} must be an object like "
                            f"{EXAMPLE}") from None
    return set_apart(found, path)


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a row. Raises DataError if the row has none, or if the last message has the role assistant. Pure."""
    prompt = row.get("prompt")
    if row.get("messages") is None and isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if row.get("messages") is None and not isinstance(prompt, list):
        raise DataError('no "messages" and no "prompt"')
    try:
        messages: list[dict[str, Any]] | None = prompt if row.get("messages") is None else field_of(row, "messages", list)
    except RowSkipped as error:
        raise DataError(str(error)) from None
    if not messages:
        raise DataError('"messages" must be a list of messages')
    if not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages):
        raise DataError('each message must be an object with a "role"')
    if messages[-1]["role"] == "assistant":
        raise DataError("the last message is the assistant's. Leave it out, so that the model answers")
    return messages


def template_of(table: SpecialTokens, run: str, moment: float) -> Template:
    """Return the run's chat template. Raises UsageError if the run has none. table: the special tokens of the run. run: the name
    of the run. Errors name it. moment: the time that the template prints as the current time, in seconds since 1970.

    Independent.
    """
    if table.template is None:
        raise UsageError(
            f"{run} has no chat template, so it cannot answer chats. Train on data prepared with --format chat, put a "
            "chat_template.jinja into a Hugging Face folder, or write the text of the chat into the prompt of mpidp generate"
        )
    template = Template(table.template, table.names, moment, table.template_args, table.tool_template)
    template.check()
    return template


def rendered(template: Template, row: dict[str, Any]) -> str:
    """Return the text of the chat in `row`, with the generation prompt at the end. Raises DataError if the template rejects the
    chat.

    A row may have the fields tools, documents and chat_template_kwargs, as for the command prepare. Each of these fields
    contains a JSON value, or this value as a string. Independent.
    """
    try:
        args, tools = field_of(row, "chat_template_kwargs", dict), objects_of(row, "tools")
        text = template.render(messages_of(row), True, tools, objects_of(row, "documents"), args)
    except (TemplateRejection, RowSkipped) as error:
        raise DataError(str(error)) from None
    return text.replace(BEGIN, "").replace(END, "")

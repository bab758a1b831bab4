"""Locate the assistant's parts in the text of a chat, and find the chat template. Pure, apart from reading files.

The assistant's parts are those that the template marks with {% generation %}. A template without these marks is rendered up to
each assistant turn (with add_generation_prompt), and again with the turn included. The assistant's part is the difference.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpidp.data.chat_template import BEGIN, END, Template
from mpidp.data.special_tokens import SpecialTokens, read_template
from mpidp.errors import DataError, UsageError

Spans = list[tuple[int, int]]  # characters [start, stop) of a text


def render(template: Template, messages: Sequence[Mapping[str, Any]]) -> tuple[str, Spans]:
    """Return the text of a chat and the spans of the assistant's parts.

    Raises TemplateRejection if the template rejects the chat. Raises DataError if the text of the first messages
    changes when more messages follow, because the start of a turn is then unknown.
    """
    text = template.render(messages)
    if template.has_marks:
        return marked(text)
    spans: Spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = template.render(messages[:i], True)
            after = text if i + 1 == len(messages) else template.render(messages[: i + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    "the assistant's part of the text cannot be located: the chat template renders the first "
                    f"{i + 1} messages differently when more messages follow, or its generation prompt differs from the "
                    "start of the answer. Mark the part with "
                    "{% generation %} ... {% endgeneration %} in the template (--chat-template FILE)"
                )
            spans.append((len(before), len(after)))
    return text, spans


def marked(text: str) -> tuple[str, Spans]:
    """Return the text without the marks BEGIN and END, and the spans between them. Pure."""
    plain, spans, since = "", [], -1
    for part in re.split(f"([{BEGIN}{END}])", text):
        if part == BEGIN:
            since = len(plain)
        elif part == END:
            spans.append((since, len(plain)))
        else:
            plain += part
    return plain, spans


def find_template(file: str | None, tokenizer: str, table: SpecialTokens) -> Template:
    """Return the chat template: `file` (--chat-template) if given, else that of the tokenizer's table.

    Raises UsageError if there is none and DataError if it is invalid. Independent.
    """
    text = read_template(Path(file)) if file else table.template
    if text is None:
        exists = Path(tokenizer).exists()
        where = f"there is none in the folder of {tokenizer}" if exists else f"the tokenizer {tokenizer} has none"
        raise UsageError(
            f"--format chat needs a chat template, and {where} (chat_template.jinja, or `chat_template` in "
            "tokenizer_config.json): give --chat-template FILE"
        )
    moment = os.environ.get("SOURCE_DATE_EPOCH", "")
    template = Template(text, table.names, float(moment) if moment.isdigit() else time.time(), table.template_args)
    template.check()
    return template

"""Locate the assistant's turns in the text of a chat, and find the chat template. Pure, apart from reading files.

Three rules locate a turn; the first that applies is used.

1. The template marks the assistant's parts with {% generation %}.
2. The text of the messages before the turn, with the generation prompt, is the beginning of the text of the chat: the turn starts
   at its end. The turn stops at the end of the text of the messages up to the turn, if that is a beginning of the text, too.
3. The turn starts where the template writes the content of the message. It stops after the content and what the template writes
   after it at the end of a chat, as far as the text has this. A mark in the content shows the place.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.messages import Chat, RowSkipped
from mpidp.data.chat_template import BEGIN, END, Template, TemplateRejection
from mpidp.data.model_files import read_template
from mpidp.data.special_tokens import SpecialTokens
from mpidp.errors import UsageError
from mpidp.runtime.log import log

Spans = list[tuple[int, int]]  # characters [start, stop) of a text


def render(template: Template, chat: Chat) -> tuple[str, Spans]:
    """Return the text of a chat, and the spans of the turns in the loss.

    Raises TemplateRejection if the template rejects the chat, and RowSkipped if a turn cannot be located.
    """
    text, template = chat.render(template, chat.messages), template.of(chat.tools)
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if not template.has_marks:
        return text, [_turn(template, chat, text, i) for i in turns if chat.learned[i]]
    text, spans = marked(text)
    if not all(chat.learned[i] for i in turns):
        if len(spans) != len(turns):
            raise RowSkipped("malformed", f"a turn has weight 0 or train false, but the template marks {len(spans)} parts for "
                                          f"{len(turns)} assistant turns, so its part is unknown")
        spans = [span for span, i in zip(spans, turns, strict=True) if chat.learned[i]]
    return text, spans


def _turn(template: Template, chat: Chat, text: str, i: int) -> tuple[int, int]:
    """Return the span of turn i in the text of the chat, by rule 2 or 3."""
    start = _beginning(template, chat, text, i, prompt=True)
    stop = _beginning(template, chat, text, i + 1, prompt=False)
    if start is None:
        start = _content(template, chat, text, i, BEGIN)[0]
    if stop is None:
        stop, tail = _content(template, chat, text, i, END)
        stop += len(os.path.commonprefix([tail, text[stop:]]))
    if start > stop:
        raise _unknown(i)
    return start, stop


def _beginning(template: Template, chat: Chat, text: str, count: int, prompt: bool) -> int | None:
    """Return the length of the text of the first messages if the text of the chat begins with it, else None."""
    if count == len(chat.messages):
        return len(text)
    try:
        before = chat.render(template, chat.messages[:count], prompt)
    except TemplateRejection:
        return None
    return len(before) if text.startswith(before) else None


def _content(template: Template, chat: Chat, text: str, i: int, mark: str) -> tuple[int, str]:
    """Return where the content of message i begins (mark BEGIN) or ends (END), and the text after it at the end of a chat.

    The mark is put at the edge of the content, else inside the white space there, which a template may remove.
    """
    for stripped in (False, True):
        message = _with_mark(chat.messages[i], mark, stripped)
        if message is not None:
            try:
                found = chat.render(template, [*chat.messages[:i], message, *chat.messages[i + 1 :]])
                if found.count(mark) == 1 and found.replace(mark, "") == text:
                    ended = chat.render(template, [*chat.messages[:i], message])
                    return found.index(mark), ended.rpartition(mark)[2]
            except TemplateRejection:
                continue
    raise _unknown(i)


def _unknown(i: int) -> RowSkipped:
    return RowSkipped(
        "malformed", f"the place of message {i + 1} in the text is unknown, because the chat template writes it in another way "
        "when other messages follow; mark it with {% generation %} ... {% endgeneration %} in the template (--chat-template FILE)"
    )


def _with_mark(message: Mapping[str, Any], mark: str, stripped: bool) -> dict[str, Any] | None:
    """Return the message with a mark at the beginning or end of its content; None if it has no text there."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [n for n, part in enumerate(content) if isinstance(part.get("text"), str)]
        if not texts:
            return None
        n = texts[0 if mark == BEGIN else -1]
        parts = [*content[:n], content[n] | {"text": _marked_text(content[n]["text"], mark, stripped)}, *content[n + 1 :]]
        return {**message, "content": parts}
    return {**message, "content": _marked_text(content, mark, stripped)} if isinstance(content, str) else None


def _marked_text(text: str, mark: str, stripped: bool) -> str:
    if mark == BEGIN:
        at = len(text) - len(text.lstrip()) if stripped else 0
    else:
        at = len(text.rstrip()) if stripped else len(text)
    return text[:at] + mark + text[at:]


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


def find_template(file: str | None, tokenizer: str, table: SpecialTokens, args: Mapping[str, Any]) -> Template:
    """Return the chat template: `file` (--chat-template) if given, else that of the tokenizer's table.

    args: its variables (--template-arg). Logs a warning if the template uses special tokens that are not defined. Raises
    UsageError if there is none and DataError if it is invalid. Independent.
    """
    text = read_template(Path(file)) if file else table.template
    if text is None:
        exists = Path(tokenizer).exists()
        where = f"there is none in the folder of {tokenizer}" if exists else f"the tokenizer {tokenizer} has none"
        raise UsageError(
            f"--format chat needs a chat template, and {where} (chat_template.jinja, or `chat_template` in "
            "tokenizer_config.json): give --chat-template FILE"
        )
    stamp = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = float(stamp) if stamp.isdigit() else time.time()
    template = Template(text, table.names, moment, {**table.template_args, **args}, None if file else table.tool_template)
    template.check()
    if missing := template.undefined_names():
        log.warning(f"the chat template uses {', '.join(missing)}, without a value in the files of {tokenizer}: it gives no text")
    return template

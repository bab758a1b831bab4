"""Locates the assistant's turns in the text of a chat. Pure.

Three rules determine where a turn starts and ends. The start is determined by the first rule that gives a start, and the end
by the first rule that gives an end.

1. If the template marks the assistant's turns with {% generation %}, a turn is the marked text.
2. Start: let A be the text of the messages before the turn, followed by the generation prompt. If the text of the chat begins
   with A, the turn starts after A. End: let B be the text of the messages up to and including the turn. If the text of the
   chat begins with B, the turn ends after B.
3. The turn starts where the template writes the content of its message, and ends after this content. To find the two places, a
   mark (a special character) is inserted into the content, and the chat is rendered again. If a mark at the end of the content
   does not work, the turn ends after the name of the last tool call of the message. The template may write more text after
   this end, such as the name of a special token. Let C be the text after the end if the chat is cut off after the turn, and D
   the text after the end in the whole chat. The turn also includes the common beginning of C and D.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from data_tools.messages import Chat
from mpidp.data.chat_template import BEGIN, END, Template, TemplateRejection
from mpidp.data.row_fields import RowSkipped

Spans = list[tuple[int, int]]  # characters [start, stop) of a text


def render(template: Template, chat: Chat) -> tuple[str, Spans]:
    """Return the text of a chat, and the spans (start, stop), in characters, of the turns that are in the loss.

    Raises TemplateRejection if the template rejects the chat, and RowSkipped if a turn cannot be located.
    """
    text, template = chat.render(template, chat.messages), template.of(chat.tools)
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if not template.has_marks:
        return text, [_turn(template, chat, text, i) for i in turns if chat.learned[i]]
    text, spans = marked(text)
    if not all(chat.learned[i] for i in turns):
        if len(spans) != len(turns):
            raise RowSkipped("malformed", f"some of its {len(turns)} assistant turns are not in the loss, but the template marks "
                                          f"{len(spans)} parts of the text, so it is unknown which part is which turn")
        spans = [span for span, i in zip(spans, turns, strict=True) if chat.learned[i]]
    return text, spans


def _turn(template: Template, chat: Chat, text: str, i: int) -> tuple[int, int]:
    """Return the span (start, stop) of message i, an assistant turn, in the text of the chat, in characters. Rule 2 or 3 of
    this file determines the start and the end."""
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
    """Render the first `count` messages alone, and return the length of the result in characters. Return None if `text`, the
    text of the whole chat, does not begin with this result, or if the template rejects these messages. `prompt`: whether to
    add the generation prompt."""
    if count == len(chat.messages):
        return len(text)
    try:
        before = chat.render(template, chat.messages[:count], prompt)
    except TemplateRejection:
        return None
    return len(before) if text.startswith(before) else None


def _content(template: Template, chat: Chat, text: str, i: int, mark: str) -> tuple[int, str]:
    """Return (place, tail). place: the position in `text` where the content of message i begins (if `mark` is BEGIN) or ends
    (END), in characters. tail: the text that follows this position if the chat ends with message i.

    The mark is inserted at several places of the message, one after the other (see _with_marks). A place works if the template
    writes the mark exactly once, and the mark changes no other text. If the content is empty and `mark` is BEGIN, only the
    text before the mark must stay the same. The first place that works is used. Raises RowSkipped if no place works.
    """
    empty = not chat.messages[i].get("content")
    for message in _with_marks(chat.messages[i], mark):
        with suppress(TemplateRejection):
            found = chat.render(template, [*chat.messages[:i], message, *chat.messages[i + 1 :]])
            place = found.find(mark)
            same = text.startswith(found[:place]) if empty and mark == BEGIN else found.replace(mark, "") == text
            if found.count(mark) == 1 and same:
                ended = chat.render(template, [*chat.messages[:i], message])
                return place, ended.rpartition(mark)[2]
    raise _unknown(i)


def _unknown(i: int) -> RowSkipped:
    return RowSkipped(
        "malformed", f"message {i + 1} cannot be found in the text, because the chat template renders this message differently "
        "when other messages follow; in the template (--chat-template FILE), mark the answers with {% generation %} ... "
        "{% endgeneration %}"
    )


def _with_marks(message: Mapping[str, Any], mark: str) -> Iterator[dict[str, Any]]:
    """Yield copies of the message, each with the mark in another place. In the first copies, the mark is at the beginning
    (BEGIN) or the end (END) of the content (see _marked_texts). If `mark` is END and the message has tool calls, the mark of
    the last copy is after the name of the last tool call."""
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        texts = [n for n, part in enumerate(content) if isinstance(part.get("text"), str)]
        for n in texts[:1] if mark == BEGIN else texts[-1:]:
            for text in _marked_texts(content[n]["text"], mark):
                yield {**message, "content": [*content[:n], content[n] | {"text": text}, *content[n + 1 :]]}
    else:
        yield from ({**message, "content": text} for text in _marked_texts(content or "", mark))
    if mark == END and isinstance(calls, list) and calls and isinstance(calls[-1], dict):
        call = calls[-1].get("function", calls[-1])
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            named = call | {"name": call["name"] + mark}
            yield {**message, "tool_calls": [*calls[:-1], calls[-1] | {"function": named} if "function" in calls[-1] else named]}


def _marked_texts(text: str, mark: str) -> Iterator[str]:
    """Yield two texts. In the first, the mark is before the text (BEGIN) or after it (END). In the second, the mark is between
    the white space at this end of the text and the rest of the text, because a template may strip the white space."""
    for outer in (text, text.lstrip() if mark == BEGIN else text.rstrip()):
        at = len(text) - len(outer) if mark == BEGIN else len(outer)
        yield text[:at] + mark + text[at:]


def marked(text: str) -> tuple[str, Spans]:
    """Return the text without the marks BEGIN and END, and the spans (start, stop) between them in the returned text. Pure."""
    plain, spans, since = "", [], -1
    for part in re.split(f"([{BEGIN}{END}])", text):
        if part == BEGIN:
            since = len(plain)
        elif part == END:
            spans.append((since, len(plain)))
        else:
            plain += part
    return plain, spans

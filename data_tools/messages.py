"""Read a row of format chat: its messages and what its chat template gets beside them. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpidp.data.chat_template import BEGIN, END, REASONING, Template
from mpidp.data.records import describe, keys_of

ROW_KEYS = frozenset({"messages", "tools", "documents", "chat_template_kwargs"})
PAIR = ("prompt", "completion")  # they may be lists of messages, in place of `messages`
MESSAGE_KEYS = frozenset({"role", "content", "name", "tool_call_id", "weight", "train"})  # others must occur in the template
WITHOUT_CONTENT = ("tool_calls", "function_call", *REASONING)  # a message with one of these needs no content


class RowSkipped(ValueError):  # noqa: N818
    """Raised for a row that is skipped. `kind` is the counter of Counts to increase."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Chat:
    """A chat and the variables of its template."""

    messages: Sequence[dict[str, Any]]
    learned: Sequence[bool]  # for each message, whether its turn is in the loss
    tools: list[Any] | None
    documents: list[Any] | None
    args: Mapping[str, Any]  # chat_template_kwargs
    unused: Sequence[str]  # keys of the row that neither we nor the template use

    def render(self, template: Template, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        """Return the text of these messages. Raises TemplateRejection."""
        return template.render(messages, prompt, self.tools, self.documents, self.args)

    def said(self) -> str:
        """Return the contents of all messages, without the template."""
        return "\n".join(text for message in self.messages for text in _strings(message.get("content")))

    def json_arguments(self) -> list[str]:
        """Return the `arguments` of tool calls that are JSON text of an object, as in OpenAI's interface, not objects."""
        found = []
        for message in self.messages:
            calls = message.get("tool_calls")
            for call in calls if isinstance(calls, list) else []:
                call = call.get("function") or call if isinstance(call, dict) else {}
                arguments = call.get("arguments") if isinstance(call, dict) else None
                if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
                    found.append(arguments)
        return found


def chat_of(fields: Mapping[str, Any], template: Template) -> Chat:
    """Return the chat of a row. Raises RowSkipped, with the reason, if the row is not a chat with an assistant's turn. Pure."""
    messages, context = _messages(fields)
    for message in messages:
        _check(message)
    args, tools = _field(fields, "chat_template_kwargs", dict) or {}, _objects(fields, "tools")
    chat = Chat(
        [{key: value for key, value in message.items() if key not in ("weight", "train")} for message in messages],
        [_learned(message) and i >= context for i, message in enumerate(messages)],
        tools, _objects(fields, "documents"), args, _unused(fields, messages, args, template.of(tools)),
    )
    if any(BEGIN in text or END in text for text in _strings([chat.messages, chat.tools, chat.documents, chat.args])):
        raise RowSkipped("malformed", "a text with the noncharacter U+FDD0 or U+FDD1")
    if not any(message["role"] == "assistant" for message in messages):
        raise RowSkipped("empty", "no assistant turn")
    if not any(chat.learned):
        raise RowSkipped("empty", "no assistant turn to learn: each has weight 0 or train false")
    return chat


def _messages(fields: Mapping[str, Any]) -> tuple[list[Any], int]:
    """Return the messages of a row, and how many of them at its beginning are context: those of `prompt`, if the row has the
    lists `prompt` and `completion`."""
    messages, prompt, completion = (fields.get(key) for key in ("messages", *PAIR))
    if messages is None and isinstance(prompt, list) and isinstance(completion, list):
        return [*prompt, *completion], len(prompt)
    if isinstance(messages, str):
        messages = _parsed("messages", messages)
    if isinstance(messages, list) and messages:
        return messages, 0
    if "messages" in fields:
        raise RowSkipped("malformed", f"`messages` is {'empty' if messages == [] else describe(messages) + ', not a list'}")
    if isinstance(prompt, str) and isinstance(completion, str):
        raise RowSkipped("malformed", "`prompt` and `completion` are strings, not messages: use --format prompt_completion")
    raise RowSkipped("malformed", f"no field `messages`; its fields are: {keys_of(dict(fields))}")


def _check(message: Any) -> None:
    """Raise RowSkipped if a message is malformed."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowSkipped("malformed", "a message without a string field `role`")
    content = message.get("content")
    if content is None and not any(message.get(key) for key in WITHOUT_CONTENT):
        raise RowSkipped("malformed", "a message without `content`, and without `tool_calls`")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return
    if content is not None and not isinstance(content, str):
        raise RowSkipped("malformed", f"a message whose `content` is {describe(content)}, not a string or a list of parts")


def _learned(message: Mapping[str, Any]) -> bool:
    """Return whether a message is in the loss: an assistant's turn, unless its `weight` is 0 or its `train` is false."""
    values = [message[key] for key in ("weight", "train") if message.get(key) is not None]
    if bad := [value for value in values if value not in (0, 1)]:
        raise RowSkipped("malformed", f"a message whose `weight` or `train` is {bad[0]!r:.40}, not 0, 1, true or false")
    if any(values) and message["role"] != "assistant":
        raise RowSkipped("malformed", f"`weight` or `train` of a {message['role']:.40} message; only assistant turns are learned")
    return message["role"] == "assistant" and all(values)


def _objects(fields: Mapping[str, Any], key: str) -> list[Any] | None:
    """Return a list of objects. It, or each object, may be a JSON string."""
    found: list[Any] | None = _field(fields, key, list)
    found = found and [_parsed(key, one) if isinstance(one, str) else one for one in found]
    if not all(isinstance(one, dict) for one in found or []):
        raise RowSkipped("malformed", f"`{key}` is not a list of objects")
    return found


def _field(fields: Mapping[str, Any], key: str, kind: type) -> Any:
    """Return the value of a field, which may be a JSON string; None if it is absent."""
    value = fields.get(key) if fields.get(key) != "" else None
    value = _parsed(key, value) if isinstance(value, str) else value
    if value is not None and not isinstance(value, kind):
        raise RowSkipped("malformed", f"`{key}` is {describe(value)}, not {describe(kind())}")
    return value


def _parsed(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowSkipped("malformed", f"`{key}` is a string that is not JSON") from None


def _unused(
    fields: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], args: Mapping[str, Any], template: Template
) -> list[str]:
    """Return the keys with a value that neither we nor the template use."""
    known = ROW_KEYS if fields.get("messages") is not None else {*ROW_KEYS, *PAIR}
    unused = [key for key, value in fields.items() if key not in known and value is not None]
    unused += [key for key in ("tools", "documents") if fields.get(key) and key not in template.text]
    unused += [f"chat_template_kwargs.{key}" for key in args if key not in template.text]
    for message in messages:
        for key, value in message.items():
            read = REASONING if key in REASONING else (key,)  # the template gets a reasoning under each of its names
            if value and key not in MESSAGE_KEYS and not any(name in template.text for name in read):
                unused.append(f"messages.{key}")
    return list(dict.fromkeys(unused))


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, keys included."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            rest += value

"""Reads a row of the format chat: its messages, and the other variables for the chat template. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpidp.data.chat_template import BEGIN, END, REASONING, Template
from mpidp.data.row_fields import RowSkipped, describe, field_of, objects_of
from mpidp.data.row_forms import MEDIA, as_messages, unknown_form

ROW_KEYS = frozenset({"messages", "tools", "documents", "chat_template_kwargs"})
PAIR = ("prompt", "completion")  # a row may have two lists of messages with these names in place of `messages`
WEIGHTS = ("weight", "train", "training", "loss")  # keys of a message; 0 or false excludes it from the loss
MESSAGE_KEYS = frozenset({"role", "content", "name", "tool_call_id", *WEIGHTS})  # other keys: see _unused()
CALLS = ("tool_calls", "function_call")
WITHOUT_CONTENT = (*CALLS, *REASONING)  # a message with one of these keys needs no content


@dataclass(frozen=True)
class Chat:
    """The messages of a chat, and the other variables for the chat template."""

    messages: Sequence[dict[str, Any]]
    learned: Sequence[bool]  # for each message, whether it is in the loss
    tools: list[Any] | None
    documents: list[Any] | None
    args: Mapping[str, Any]  # chat_template_kwargs
    unused: Sequence[str]  # keys of the row that neither prepare nor the template uses
    form: str = ""  # the form of the row, if it is not that of `messages`: see row_forms.py

    def render(self, template: Template, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        """Return the text that the template writes for these messages. `prompt`: whether to add the generation prompt. Raises
        TemplateRejection if the template rejects the messages."""
        return template.render(messages, prompt, self.tools, self.documents, self.args)

    def said(self) -> str:
        """Return the contents of all messages, without the template."""
        return "\n".join(text for message in self.messages for text in _strings(message.get("content")))

    def json_arguments(self) -> list[str]:
        """Return the `arguments` of those tool calls whose `arguments` are a string with JSON, as in OpenAI's interface. Other
        tool calls have an object as `arguments`."""
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
    """Return the chat of a row. Raises RowSkipped, with the reason, if the row is not a chat or no assistant's turn is in the
    loss. Pure."""
    fields, form = as_messages(fields)
    messages, context = _messages(fields)
    for message in messages:
        _check(message)
    args, tools = field_of(fields, "chat_template_kwargs", dict) or {}, objects_of(fields, "tools")
    chat = Chat(
        [{key: value for key, value in message.items() if key not in WEIGHTS} for message in messages],
        [_learned(message) and i >= context for i, message in enumerate(messages)],
        tools, objects_of(fields, "documents"), args, _unused(fields, messages, args, template.of(tools)), form,
    )
    if any(BEGIN in text or END in text for text in _strings([chat.messages, chat.tools, chat.documents, chat.args])):
        raise RowSkipped("malformed", "a text with U+FDD0 or U+FDD1, which mpidp uses to mark turns")
    if not any(message["role"] == "assistant" for message in messages):
        raise RowSkipped("empty", "no assistant turn")
    if not any(chat.learned):
        raise RowSkipped("empty", "no assistant turn to learn: each has `weight` 0, or `train` or `loss` false")
    for message, learned in zip(messages, chat.learned, strict=True):
        calls = [key for key in CALLS if message.get(key) and f"messages.{key}" in chat.unused]
        if learned and calls and not message.get("content"):
            raise RowSkipped("malformed", f"the chat template does not write `{calls[0]}`, and an assistant turn has nothing "
                                          "else; give a template for tools with --chat-template")
    return chat


def _messages(fields: Mapping[str, Any]) -> tuple[list[Any], int]:
    """Return (messages, context) of a row. context: how many of the first messages are never in the loss. It is the length of
    `prompt` if the row has the lists `prompt` and `completion` instead of `messages`, else 0. Raises RowSkipped if the row has
    neither."""
    messages, prompt, completion = (fields.get(key) for key in ("messages", *PAIR))
    if messages is None and isinstance(prompt, list) and isinstance(completion, list):
        return [*prompt, *completion], len(prompt)
    if isinstance(messages, list) and messages:
        return messages, 0
    if "messages" in fields:
        raise RowSkipped("malformed", f"`messages` is {'empty' if messages == [] else describe(messages) + ', not a list'}")
    if isinstance(prompt, str) and isinstance(completion, str):
        raise RowSkipped("malformed", "`prompt` and `completion` are strings, not messages; use --format prompt_completion")
    raise RowSkipped("malformed", unknown_form(fields))


def _check(message: Any) -> None:
    """Raise RowSkipped if a message is malformed."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowSkipped("malformed", "a message without a string field `role`")
    content = message.get("content")
    if content is None and not any(message.get(key) for key in WITHOUT_CONTENT):
        raise RowSkipped("malformed", "a message without `content`, and without `tool_calls`")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = [str(part.get("type")) for part in content]
        if media := [kind for kind in kinds if any(word in kind for word in MEDIA)]:
            raise RowSkipped("malformed", f"a message has a part of type `{media[0]:.40}`, but mpidp trains on text only")
        return
    if content is not None and not isinstance(content, str):
        raise RowSkipped("malformed", f"a message whose `content` is {describe(content)}, not a string or a list of parts")


def _learned(message: Mapping[str, Any]) -> bool:
    """Return whether a message is in the loss. An assistant's message is in the loss unless the value of one of the keys
    WEIGHTS is 0 or false. Other messages are never in the loss. Raises RowSkipped if a message has an invalid value for one of
    these keys, or if a message of another role has the value 1 or true."""
    values = [message[key] for key in WEIGHTS if message.get(key) is not None]
    if bad := [value for value in values if value not in (0, 1)]:
        raise RowSkipped("malformed", f"a message whose `weight`, `train` or `loss` is {bad[0]!r:.40}, not 0, 1, true or false")
    if any(values) and message["role"] != "assistant":
        raise RowSkipped("malformed", f"a {message['role']:.40} message has `weight`, `train` or `loss`, but only assistant "
                                      "turns are learned")
    return message["role"] == "assistant" and all(values)


def _unused(
    fields: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], args: Mapping[str, Any], template: Template
) -> list[str]:
    """Return the keys of a row whose values neither prepare nor the template uses. `messages`, `args`: the row's messages and
    chat_template_kwargs."""
    known = ROW_KEYS if fields.get("messages") is not None else {*ROW_KEYS, *PAIR}
    unused = [key for key, value in fields.items() if key not in known and value is not None]
    unused += [key for key in ("tools", "documents") if fields.get(key) and key not in template.text]
    unused += [f"chat_template_kwargs.{key}" for key in args if key not in template.text]
    for message in messages:
        for key, value in message.items():
            read = REASONING if key in REASONING else (key,)  # render() passes the reasoning under each of these names
            if value not in (None, "", [], {}) and key not in MESSAGE_KEYS and not any(name in template.text for name in read):
                unused.append(f"messages.{key}")
    return list(dict.fromkeys(unused))


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, including keys."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            rest += value

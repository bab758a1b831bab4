"""Converts the forms in which rows of chats are published to the common form {"messages": [{"role", "content"}, ...]}. Pure.

| form | fields of a row (after a semicolon: optional fields) |
|---|---|
| messages | `messages`: messages with `role` and `content`, as in OpenAI's interface and transformers |
| ShareGPT | `conversations` or `conversation`: messages with `from` and `value`, or `role` and `content`; `system`, `tools` |
| Alpaca | `instruction`, `input`, `output`; `system`, `history` (pairs of a question and an answer) |
| Dolly | `instruction`, `context`, `response` |

To add a form like Alpaca or Dolly, add an entry to INSTRUCTIONS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpidp.data.row_fields import RowSkipped, describe, keys_of, objects_of, parsed_field

LISTS = ("messages", "conversations", "conversation")  # possible names of the field with the list of messages
INSTRUCTIONS = {"Alpaca": ("instruction", "input", "output"), "Dolly": ("instruction", "context", "response")}
ROLES = {  # the role for each value of `from`, including the values of LLaMA-Factory and axolotl
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip
ALPACA = (  # the parts of the prompt template of Stanford's Alpaca
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n",
    ", paired with an input that provides further context", "### Instruction:\n{}\n\n", "### Input:\n{}\n\n", "### Response:\n",
)
MARKS = ("<|im_start|>", "[INST]", "<|start_header_id|>", "<start_of_turn>", "### Response:")  # they occur in texts of chats
UNWANTED = ("label", "kto_tag")  # if a row has false in such a field, its answer is unwanted (TRL, LLaMA-Factory)
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
PREFERENCES = (
    "rows of preferences (`chosen`, `rejected`) are not supported, because mpidp trains on one answer per row. "
    "Write the answer to learn as the last message of `messages`, or as `completion`"
)


def as_messages(fields: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Convert a row to the common form {"messages": [{"role", "content"}, ...]}. Return (row, name of the form that the row had).

    Fields that do not belong to the form stay in the row. A row that already has the common form, or that has an unknown form,
    is not converted. The returned name is then "". Raises RowSkipped if the row has preferences (`chosen`, `rejected`),
    images, audio or video, if the row marks its answer as unwanted, or if a row of a known form is malformed."""
    row = {key: value for key, value in fields.items() if value is not None}
    if found := [key for key in MEDIA if row.get(key)]:
        raise RowSkipped("malformed", f"the row has `{found[0]}`, but mpidp trains on text only")
    _refuse_unwanted(row)
    key = next((name for name in LISTS if name in row), "")
    if key:
        messages = _objects(row, key)
        if key == "messages" and not any("from" in one for one in messages or [] if isinstance(one, dict)):
            _refuse_preferences(row, messages)
            return (row | {key: messages} if messages is not None else row), ""
        if messages is None:
            raise RowSkipped("malformed", f"`{key}` is {describe(row[key])}, not a list of messages")
        read = [_of_sharegpt(one) for one in messages]
        _refuse_preferences(row, read)
        return _with_system(row, key, read), "ShareGPT"
    _refuse_preferences(row, None)
    for form, names in INSTRUCTIONS.items():
        instruction, more, answer = names
        if instruction in row and answer in row:
            question, words = _question(row, *names)
            history = _history(row)
            row = {key: value for key, value in row.items() if key not in (*names, "history")}
            messages = [*history, {"role": "user", "content": "\n".join(filter(None, question))}]
            return _with_system(row, "", [*messages, {"role": "assistant", "content": words}]), form
    return row, ""


def as_pair(fields: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Convert a row of instructions to a row with `prompt` and `completion`. The prompt follows the prompt template of Stanford's
    Alpaca. Return (row, name of the form that the row had). A row that already has a prompt, or that has an unknown form, is not
    converted. The returned name is then "". Raises RowSkipped if the row needs --format chat or has preferences, or if the row
    marks its answer as unwanted."""
    row = {key: value for key, value in fields.items() if value is not None}
    if "completion" not in row:
        _refuse_preferences(row, None)
    _refuse_unwanted(row)
    if "prompt" not in row and (key := next((name for name in LISTS if name in row), "")):
        raise RowSkipped("malformed", f"`{key}` holds messages, so the row needs --format chat")
    for form, names in INSTRUCTIONS.items():
        if names[0] in row and names[2] in row and "prompt" not in row:
            if found := [key for key in ("history", "system") if row.get(key)]:
                raise RowSkipped("malformed", f"a row of form {form} with `{found[0]}` needs --format chat")
            (instruction, more), answer = _question(row, *names)
            head, paired, first, second, last = ALPACA
            prompt = head.format(paired * bool(more)) + first.format(instruction) + (second.format(more) if more else "") + last
            return {k: v for k, v in row.items() if k not in names} | {"prompt": prompt, "completion": answer}, form
    return row, ""


def _refuse_unwanted(row: Mapping[str, Any]) -> None:
    """Raise RowSkipped if a field of the row says that the answer in this row is unwanted."""
    if found := [key for key in UNWANTED if str(row.get(key)).lower() == "false"]:  # a .csv file has texts only
        raise RowSkipped("malformed", f"`{found[0]}` is false: the model should avoid this answer, so mpidp does not train on it")


def _refuse_preferences(row: Mapping[str, Any], messages: list[Any] | None) -> None:
    """Raise RowSkipped if the row has the fields `chosen` and `rejected`, unless its last message is from the assistant.
    `messages`: the messages of the row, or None if it has none."""
    last = messages[-1] if messages else None
    ends = isinstance(last, dict) and last.get("role") == "assistant"
    if "chosen" in row and "rejected" in row and not ends:
        raise RowSkipped("malformed", PREFERENCES)


def _objects(row: Mapping[str, Any], key: str) -> list[Any] | None:
    """Return the list of messages in the field `key`, or None if the field does not contain a list. The field may also contain
    JSON text, or an object of lists. The datasets library writes an object of lists for the feature Sequence({"from": ...,
    "value": ...})."""
    value = row[key]
    value = parsed_field(key, value) if isinstance(value, str) else value
    if isinstance(value, dict) and value and all(isinstance(one, list) for one in value.values()):
        if len(set(map(len, value.values()))) > 1:
            raise RowSkipped("malformed", f"the lists in `{key}` have different lengths")
        value = [{k: v for k, v in zip(value, one, strict=True) if v is not None} for one in zip(*value.values(), strict=True)]
    return value if isinstance(value, list) else None


def _of_sharegpt(message: Any) -> dict[str, Any]:
    """Convert a message of ShareGPT to a message with the keys `role` and `content`. A function call gets the key `tool_calls`
    instead of `content`."""
    if not isinstance(message, dict):
        raise RowSkipped("malformed", f"a message is {describe(message)}, not an object")
    if "from" not in message:
        return message
    sender, value = message["from"], message.get("value")
    role = ROLES.get(sender.lower()) if isinstance(sender, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise RowSkipped("malformed", f"`from` of a message is {sender!r:.40}, but must be one of {known}")
    rest = {key: one for key, one in message.items() if key not in ("from", "value")}
    if sender.lower() == "function_call":
        return {"role": role, "tool_calls": _calls(value), **rest}
    return {"role": role, "content": value, **rest}


def _calls(value: Any) -> list[dict[str, Any]]:
    """Return the tool calls of a message that is a function call. `value`: the content of the message, which is an object
    {"name", "arguments"}, a list of such objects, or JSON text of either."""
    found = parsed_field("value", value) if isinstance(value, str) else value
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(one, dict) and isinstance(one.get("name"), str) and "arguments" in one for one in calls):
        raise RowSkipped("malformed", "the `value` of a function_call is not JSON with `name` and `arguments`")
    for one in calls:
        if isinstance(one["arguments"], str):
            one["arguments"] = parsed_field("arguments", one["arguments"])
    return [{"type": "function", "function": {"name": one["name"], "arguments": one["arguments"]}} for one in calls]


def _with_system(row: Mapping[str, Any], key: str, messages: list[Any]) -> dict[str, Any]:
    """Return the row with `messages` in its field `messages`, and without the field `key`. The text in the field `system` becomes
    the first message, unless a system message already exists. Tools without a type get the type "function", as in
    transformers."""
    found = {k: v for k, v in row.items() if k != key} | {"messages": messages}
    if isinstance(system := row.get("system"), str) and not any(one.get("role") == "system" for one in messages):
        del found["system"]
        found["messages"] = [{"role": "system", "content": system}, *messages] if system else messages
    if tools := objects_of(row, "tools"):
        found["tools"] = [_typed(one) for one in tools]
    return found


def _typed(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool


def _question(row: Mapping[str, Any], instruction: str, more: str, answer: str) -> tuple[tuple[str, str], str]:
    """Return ((instruction, input), answer), the values of three fields of a row of instructions. `instruction`, `more`,
    `answer`: the names of these three fields. Raises RowSkipped if the answer is empty, or if a value is not a string."""
    words = [row.get(key, "") for key in (instruction, more, answer)]
    for key, value in zip((instruction, more, answer), words, strict=True):
        if not isinstance(value, str):
            raise RowSkipped("malformed", f"`{key}` is {describe(value)}, not a string")
    if not words[2]:
        raise RowSkipped("empty", f"its `{answer}` is empty")
    return (words[0], words[1]), words[2]


def _history(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the messages in the field `history` of a row. Each entry of this field is a pair of a question and its answer."""
    history = row.get("history") or []
    history = parsed_field("history", history) if isinstance(history, str) else history
    pairs = isinstance(history, list) and all(isinstance(one, list) and len(one) == 2 for one in history)
    if not pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise RowSkipped("malformed", "`history` is not a list of pairs of strings")
    return [{"role": role, "content": text} for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]


def unknown_form(fields: Mapping[str, Any]) -> str:
    """Return a message that says why a row of an unknown form is skipped."""
    if isinstance(text := fields.get("text"), str):
        what = "a chat that a template has rendered" if any(mark in text for mark in MARKS) else "plain text"
        return (f"no field `messages`, but a field `text` with {what}; to train on it, use --format text; the fields of the row "
                f"are: {keys_of(fields)}")
    return f"no field `messages`, `conversations`, or `instruction` and `output`; the fields of the row are: {keys_of(fields)}"

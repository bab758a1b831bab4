"""Rows to be learned from in part: .jsonl of {"prompt", "completion"}, or of {"messages": [{"role", "content"}, ...]}.

Of a row the completion, or what the assistant says, is learned; the rest is its context.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_tools.chat import BEGIN, END, Refused, Spans, Template
from data_tools.sources import LINE_SUFFIXES, Reader, SourceFile, decoded, raw_lines
from mpidp.errors import DataError

FORMATS = ("text", "prompt_completion", "chat")


class Left(ValueError):  # noqa: N818
    """A row that is left out, and is counted as of this kind."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Row:
    """One line: texts that are encoded each for itself, with the characters of each that are learned."""

    place: str
    parts: list[tuple[str, Spans]]
    ends: bool  # it ends with what is learned, so that the end is learned too


@dataclass
class RowReader(Reader):
    """Reads rows, and counts what it meets. Independent."""

    template: Template | None = None  # of conversations

    def pieces(self, file: SourceFile) -> Iterator[str | None]:
        """The text of the rows, for a tokenizer that is made from it; None ends a row."""
        for row in self.rows(file):
            for text, _ in row.parts:
                yield text
            yield None

    def rows(self, file: SourceFile) -> Iterator[Row]:
        """The rows of a file in order. DataError when it cannot be read, or holds what --strict forbids."""
        self.counts.files += 1
        if not file.name.lower().endswith(LINE_SUFFIXES):
            self.leave_out("binary", file, "is no .jsonl, .jsonl.gz or .jsonl.zst, which hold rows")
            return
        if file.size == 0:
            self.leave_out("empty", file, "is empty")
            return
        with self.names(file):
            for number, line in enumerate(raw_lines(file), 1):
                place = f"{file.path}:{number}"
                if not line.strip():
                    continue
                try:
                    row = self._row(place, line)
                except Left as left:
                    self.bad(left.kind, place, str(left))
                except Refused as refusal:
                    self.bad("malformed", place, str(refusal))
                except DataError as error:
                    raise DataError(f"{place}: {error}") from None
                else:
                    if row is not None:
                        yield row

    def bad(self, kind: str, place: str, reason: str) -> None:
        """Count a row that is left out; DataError where that is forbidden."""
        if self.strict:
            raise DataError(f"{place}: {reason}; mend the line, or leave out --strict to skip such lines")
        self.counts.note(kind, f"{place}: {reason}")

    def _row(self, place: str, line: bytes) -> Row | None:
        text, replaced = decoded(line)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Left("malformed", f"not valid JSON ({error})") from None
        value, mended = _mended(value)
        if replaced or mended:
            self.counts.note("bad_utf8", place)
            if self.bad_utf8 == "skip":
                return None
        if not isinstance(value, dict):
            raise Left("malformed", "not an object")
        return self._conversation(place, value) if self.template is not None else self._pair(place, value)

    def _pair(self, place: str, value: dict[str, Any]) -> Row:
        prompt, completion = value.get("prompt"), value.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise Left("malformed", "no fields `prompt` and `completion` that are strings")
        if not completion:
            raise Left("empty", "its completion is empty")
        return Row(place, [(prompt, []), (completion, [(0, len(completion))])], ends=True)

    def _conversation(self, place: str, value: dict[str, Any]) -> Row:
        messages = value.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Left("malformed", "no field `messages` that is a list of messages")
        for message in messages:
            said = message if isinstance(message, dict) else {}
            if not isinstance(said.get("role"), str) or not isinstance(said.get("content"), str):
                raise Left("malformed", "a message without `role` and `content` that are strings")
            if BEGIN in said["content"] or END in said["content"]:
                raise Left("malformed", "a message with U+FDD0 or U+FDD1, which are no characters")
        assert self.template is not None
        if not any(message["role"] == "assistant" for message in messages):
            raise Left("empty", "no turn of the assistant's")
        text, spans = self.template.render(messages)
        if not any(start < stop for start, stop in spans):
            raise Left("empty", "the chat template lets the assistant say nothing")
        return Row(place, [(text, spans)], ends=messages[-1]["role"] == "assistant")


def _mended(value: Any) -> tuple[Any, bool]:
    """With what is no Unicode (lone surrogates) replaced; was there any?"""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode(errors="surrogatepass").decode(errors="replace"), True
        return value, False
    if isinstance(value, list):
        found = [_mended(one) for one in value]
        return [one for one, _ in found], any(bad for _, bad in found)
    if isinstance(value, dict):
        pairs = {key: _mended(one) for key, one in value.items()}
        return {key: one for key, (one, _) in pairs.items()}, any(bad for _, bad in pairs.values())
    return value, False

"""Read training rows with a loss mask: .jsonl lines {"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}.

The loss is on the completion or on the assistant's turns. The rest of a row is context.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_tools.chat import Spans, render
from data_tools.sources import LINE_SUFFIXES, SourceFile, SourceReader, decoded, raw_lines
from mpidp.data.chat_template import BEGIN, END, Template, TemplateRejection
from mpidp.errors import DataError

FORMATS = ("text", "prompt_completion", "chat")


class RowSkipped(ValueError):  # noqa: N818
    """Raised for a row that is skipped. `kind` is the counter of Counts to increase."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class TrainingRow:
    """The text of one line, and the spans of its characters that are in the loss."""

    place: str  # file and line number
    text: str
    spans: Spans
    said: str  # what the row itself says, without the template
    ends: bool  # whether the row ends with a part in the loss; the end-of-document token is then in the loss, too


@dataclass
class RowReader(SourceReader):
    """Reads training rows and counts problems. Independent."""

    template: Template | None = None  # chat template; None for prompt/completion rows

    def pieces(self, file: SourceFile) -> Iterator[str | None]:
        """Yield the text of the rows, to train a tokenizer. None ends a row."""
        for row in self.rows(file):
            yield row.text
            yield None

    def rows(self, file: SourceFile) -> Iterator[TrainingRow]:
        """Yield the rows of a file in order. Raises DataError if the file cannot be read or, with --strict, a row is bad."""
        self.counts.files += 1
        if not file.name.lower().endswith(LINE_SUFFIXES):
            self.leave_out("binary", file, "is not a .jsonl, .jsonl.gz or .jsonl.zst file; rows must be in such a file")
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
                except RowSkipped as skipped:
                    self.skip(skipped.kind, place, str(skipped))
                except TemplateRejection as rejection:
                    self.skip("malformed", place, str(rejection))
                except DataError as error:
                    raise DataError(f"{place}: {error}") from None
                else:
                    if row is not None:
                        yield row

    def skip(self, kind: str, place: str, reason: str) -> None:
        """Count a skipped row. With --strict, raise DataError instead."""
        if self.strict:
            raise DataError(f"{place}: {reason}; correct the line, or omit --strict to skip such lines")
        self.counts.note(kind, f"{place}: {reason}")

    def _row(self, place: str, line: bytes) -> TrainingRow | None:
        text, replaced = decoded(line)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RowSkipped("malformed", f"not valid JSON ({error})") from None
        value, had_surrogates = _replace_surrogates(value)
        if replaced or had_surrogates:
            self.counts.note("bad_utf8", place)
            if self.bad_utf8 == "skip":
                return None
        if not isinstance(value, dict):
            raise RowSkipped("malformed", "not a JSON object")
        return self._conversation(place, value) if self.template is not None else self._pair(place, value)

    def _pair(self, place: str, value: dict[str, Any]) -> TrainingRow:
        prompt, completion = value.get("prompt"), value.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise RowSkipped("malformed", "no string fields `prompt` and `completion`")
        if not completion:
            raise RowSkipped("empty", "its completion is empty")
        return TrainingRow(place, prompt + completion, [(len(prompt), len(prompt + completion))],
                           prompt + completion, ends=True)

    def _conversation(self, place: str, value: dict[str, Any]) -> TrainingRow:
        messages = value.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RowSkipped("malformed", "no field `messages` with a list of messages")
        for message in messages:
            fields = message if isinstance(message, dict) else {}
            if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
                raise RowSkipped("malformed", "a message without string fields `role` and `content`")
            if BEGIN in fields["content"] or END in fields["content"]:
                raise RowSkipped("malformed", "a message with the noncharacter U+FDD0 or U+FDD1")
        assert self.template is not None
        if not any(message["role"] == "assistant" for message in messages):
            raise RowSkipped("empty", "no assistant turn")
        text, spans = render(self.template, messages)
        if not any(start < stop for start, stop in spans):
            raise RowSkipped("empty", "the chat template renders empty assistant turns")
        said = "\n".join(message["content"] for message in messages)
        return TrainingRow(place, text, spans, said, ends=messages[-1]["role"] == "assistant")


def _replace_surrogates(value: Any) -> tuple[Any, bool]:
    """Replace lone surrogates in all strings of a JSON value; return (value, whether there were any)."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode(errors="surrogatepass").decode(errors="replace"), True
        return value, False
    if isinstance(value, list):
        found = [_replace_surrogates(one) for one in value]
        return [one for one, _ in found], any(bad for _, bad in found)
    if isinstance(value, dict):
        pairs = {key: _replace_surrogates(one) for key, one in value.items()}
        return {key: one for key, (one, _) in pairs.items()}, any(bad for _, bad in pairs.values())
    return value, False

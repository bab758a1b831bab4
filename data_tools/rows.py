"""Read training rows with a loss mask: {"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}.

The loss is on the completion or on the assistant's turns. The rest of a row is context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_tools.chat import Spans, render
from data_tools.files import SourceFile
from data_tools.sources import SourceReader
from mpidp.data.chat_template import BEGIN, END, Template, TemplateRejection
from mpidp.data.records import keys_of
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
        for record in self.records(file):
            if record.fields is None:
                self.skip("malformed", record.place, record.reason)
                continue
            if record.bad_utf8:
                self.counts.note("bad_utf8", record.place)
                if self.bad_utf8 == "skip":
                    continue
            try:
                yield self._row(record.place, record.fields)
            except RowSkipped as skipped:
                self.skip(skipped.kind, record.place, str(skipped))
            except TemplateRejection as rejection:
                self.skip("malformed", record.place, str(rejection))
            except DataError as error:
                raise DataError(f"{record.place}: {error}") from None

    def _row(self, place: str, value: dict[str, Any]) -> TrainingRow:
        return self._conversation(place, value) if self.template is not None else self._pair(place, value)

    def _pair(self, place: str, value: dict[str, Any]) -> TrainingRow:
        prompt, completion = value.get("prompt"), value.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise RowSkipped("malformed", f"no string fields `prompt` and `completion`; its fields are: {keys_of(value)}")
        if not completion:
            raise RowSkipped("empty", "its completion is empty")
        return TrainingRow(place, prompt + completion, [(len(prompt), len(prompt + completion))],
                           prompt + completion, ends=True)

    def _conversation(self, place: str, value: dict[str, Any]) -> TrainingRow:
        messages = value.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RowSkipped("malformed", f"no field `messages` with a list of messages; its fields are: {keys_of(value)}")
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


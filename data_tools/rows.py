"""Reads training rows. A row has the keys `prompt` and `completion`, or the key `messages` with a list of {"role", "content"}.

The completion or the assistant's turns are in the loss. The rest of a row is context, which is not in the loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_tools.chat import Spans, render
from data_tools.files import SourceFile
from data_tools.messages import chat_of
from data_tools.sources import SourceReader
from mpidp.data.chat_template import Template, TemplateRejection
from mpidp.data.row_fields import RowSkipped, keys_of
from mpidp.data.row_forms import as_pair

FORMATS = ("text", "prompt_completion", "chat")


@dataclass(frozen=True)
class TrainingRow:
    """The text of one row. `spans`: the ranges [start, stop) of the text that are in the loss, in characters."""

    place: str  # file and line number
    text: str
    spans: Spans
    said: str  # the texts of the row, without the text that the template adds
    ends: bool  # whether the row ends with text in the loss; if so, an appended end-of-document token is in the loss, too
    unmarked: bool = False  # whether the row has a template that does not mark the assistant's turns
    cut: bool = False  # whether the text is only the beginning of the row

    def beginning(self, characters: int) -> TrainingRow:
        """Return the row itself if its text has at most `characters` characters, else a copy with only the first `characters`
        characters. Pure."""
        if len(self.text) <= characters:
            return self
        spans = [(start, min(stop, characters)) for start, stop in self.spans if start < characters]
        return replace(self, text=self.text[:characters], spans=spans, ends=False, cut=True)


@dataclass
class RowReader(SourceReader):
    """Reads training rows, and counts problems. Independent."""

    template: Template | None = None  # chat template; None for prompt/completion rows

    def pieces(self, file: SourceFile) -> Iterator[str | None]:
        """Yield the text of each row, followed by None. The texts are used to train a tokenizer."""
        for row in self.rows(file):
            yield row.text
            yield None

    def rows(self, file: SourceFile) -> Iterator[TrainingRow]:
        """Yield the rows of a file in order. Bad rows are counted and skipped. With --strict, raises DataError for a bad row
        instead. Raises DataError if the file cannot be read."""
        for record in self.records(file):
            if record.fields is None:
                self.skip("malformed", record.place, record.reason)
                continue
            if record.bad_utf8:
                self.counts.note("bad_utf8", record.place)
                if self.bad_utf8 == "skip":
                    continue
            try:
                row = self._row(record.place, record.fields)
                self.ticker.add(documents=1, size=len(row.text))
                yield row
            except RowSkipped as skipped:
                self.skip(skipped.kind, record.place, str(skipped))
            except TemplateRejection as rejection:
                self.skip("malformed", record.place, str(rejection))

    def _row(self, place: str, value: dict[str, Any]) -> TrainingRow:
        return self._pair(place, value) if self.template is None else self._conversation(place, value, self.template)

    def _pair(self, place: str, value: dict[str, Any]) -> TrainingRow:
        value, form = as_pair(value)
        prompt, completion = value.get("prompt"), value.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            raise RowSkipped("malformed", "`prompt` and `completion` are lists of messages; use --format chat")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise RowSkipped("malformed", f"no string fields `prompt` and `completion`; its fields are: {keys_of(value)}")
        if not completion:
            raise RowSkipped("empty", "its completion is empty")
        self._note_unused(place, [key for key in value if key not in ("prompt", "completion") and value[key] is not None])
        self.counts.read_as(form)
        text = prompt + completion
        return TrainingRow(place, text, [(len(prompt), len(text))], text, ends=True)

    def _conversation(self, place: str, value: dict[str, Any], template: Template) -> TrainingRow:
        chat = chat_of(value, template)
        arguments = chat.json_arguments()
        try:
            text, spans = render(template, chat)
        except TemplateRejection as rejection:
            advice = "; write `arguments` of a tool call as an object, not as JSON text" if arguments else ""
            raise RowSkipped("malformed", f"{rejection}{advice}") from None
        if not any(start < stop for start, stop in spans):
            raise RowSkipped("empty", "the chat template renders empty assistant turns")
        self._note_unused(place, chat.unused)
        self.counts.read_as(chat.form)
        if any(json.dumps(one, ensure_ascii=False) in text for one in arguments):
            self.counts.note("quoted", place)
        return TrainingRow(place, text, spans, chat.said(), chat.learned[-1], not template.of(chat.tools).has_marks)

    def _note_unused(self, place: str, keys: Sequence[str]) -> None:
        if keys:
            self.counts.note("unused", f"{place}: {keys_of(dict.fromkeys(keys))}")

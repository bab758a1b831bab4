"""Counts the files and documents that are read or skipped during preparation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import groupby

from mpidp.runtime.log import counted

MAX_SHOWN = 5  # number of locations that are listed for each kind of bad input


@dataclass
class Counts:
    """The numbers of files and documents that were read or skipped. `problems` maps each kind of problem to its first few
    locations."""

    files: int = 0
    documents: int = 0
    empty: int = 0  # files of 0 bytes and documents without text
    binary: int = 0  # files with a NUL byte, and special files
    bad_utf8: int = 0  # documents whose invalid UTF-8 was replaced, or which were skipped
    malformed: int = 0  # lines or rows without text
    long: int = 0  # rows longer than a window, which were skipped or truncated
    unused: int = 0  # rows with keys that neither prepare nor the chat template uses
    special: int = 0  # documents and rows that name a special token, such as <|im_start|>
    quoted: int = 0  # chats whose tool calls have JSON text as arguments, which the template writes as a string
    doubtful: int = 0  # files that were read as plain text, but may contain rows
    problems: dict[str, list[str]] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)  # number of rows of each form other than the usual one (row_forms.py)

    def note(self, kind: str, where: str) -> None:
        """Count a problem of this kind. `where`: the location of the problem. The locations of the first few problems of each
        kind are stored."""
        setattr(self, kind, getattr(self, kind) + 1)
        shown = self.problems.setdefault(kind, [])
        if len(shown) < MAX_SHOWN:
            shown.append(where)

    def read_as(self, form: str) -> None:
        """Count a row that was converted from another form. `form`: the name of this form in row_forms.py, such as "ShareGPT".
        If `form` is "", the row had the usual form and is not counted."""
        if form:
            self.forms[form] = self.forms.get(form, 0) + 1

    def left_out(self) -> dict[str, int]:
        """Return the counts that index.json records."""
        always = {key: getattr(self, key) for key in ("empty", "binary", "bad_utf8", "malformed")}
        return always | ({"long": self.long} if self.long else {})

    def complaints(self) -> list[str]:
        """Return one line of text for each kind of problem, and for each form of row that was converted."""
        texts = {"empty": "empty files or documents skipped", "binary": "binary or special files skipped",
                 "bad_utf8": "documents with invalid UTF-8", "malformed": "malformed lines or rows skipped",
                 "unused": "rows with keys that are not used",
                 "special": "documents or rows with the name of a special token in the text",
                 "quoted": "rows with JSON text as `arguments` of a tool call, which the chat template writes as a quoted "
                           "string (write `arguments` as an object to avoid the quotes)",
                 "long": "rows longer than --seq-len tokens, skipped (with --truncate: truncated)",
                 "doubtful": "files with JSON or a table, read as plain text"}
        lines = [f"{count:,} row{'s' * (count != 1)} read as {form} rows" for form, count in sorted(self.forms.items())]
        for kind, places in self.problems.items():
            count = getattr(self, kind)
            of_files = kind == "empty" and not any(": " in place for place in places)  # for rows, ": REASON" follows the place
            where = "" if of_files else f": {_joined(places)}{', ...' if count > len(places) else ''}"
            text = texts[kind]
            if count == 1:
                text = re.sub(r"\b(file|document|line|row)s\b", r"\1", text, count=2)
            lines.append(f"{count:,} {text}{where}")
        return lines

    def no_text(self) -> str:
        """Return the error message for a source without any document. It states how many files, empty inputs, binary inputs and
        malformed rows there were. The lines of complaints() follow."""
        kinds = f"{self.empty} empty, {self.binary} binary, {self.malformed} malformed lines or rows"
        files = f"{counted(self.files, 'file')}: {kinds}"
        return f"the source has no text at all ({files}). Give --source a file or folder with text{self.reasons()}"

    def reasons(self) -> str:
        """Return the lines of complaints(), indented, to append to an error message."""
        return "".join(f"\n  {line}" for line in self.complaints())

    @staticmethod
    def problem_kinds() -> list[str]:
        """Return the names of the fields that count problems."""
        return [one.name for one in fields(Counts) if one.name not in ("files", "documents", "problems", "forms")]

    @classmethod
    def total(cls, of_ranks: Iterable[Iterable[Counts]]) -> Counts:
        """Return the sum of all counts. `of_ranks`: for each rank, the counts of its readers."""
        found = cls()
        for counts in of_ranks:
            for one in counts:
                found.add(one)
        return found

    def add(self, other: Counts) -> None:
        """Add the counts and locations of `other`."""
        for key in ("files", "documents", *self.problem_kinds()):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        for kind, places in other.problems.items():
            self.problems[kind] = (self.problems.get(kind, []) + places)[:MAX_SHOWN]
        for form, count in other.forms.items():
            self.forms[form] = self.forms.get(form, 0) + count


def _joined(places: Iterable[str]) -> str:
    """Join locations to one text, separated by commas. A location may end in ": REASON". Consecutive locations with the same
    reason share it: the reason is written once, after the last of them."""
    groups = groupby((place.partition(": ") for place in places), key=lambda parts: parts[2])
    return ", ".join(", ".join(place for place, *_ in found) + (f": {reason}" if reason else "") for reason, found in groups)

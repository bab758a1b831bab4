"""What a preparation read and what it left out."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_SHOWN = 5  # places of each kind of bad input


@dataclass
class Counts:
    """What was read and what was left out. `problems` names the first few of each kind."""

    files: int = 0
    documents: int = 0
    empty: int = 0  # files of no bytes, documents of no text
    binary: int = 0  # files with a NUL byte, and what is not a regular file
    bad_utf8: int = 0  # documents that were not UTF-8, replaced or skipped
    malformed: int = 0  # lines or rows without a text
    long: int = 0  # rows of more tokens than a window, left out or cut
    problems: dict[str, list[str]] = field(default_factory=dict)

    def note(self, kind: str, where: str) -> None:
        """Count one problem and remember the first few places."""
        setattr(self, kind, getattr(self, kind) + 1)
        shown = self.problems.setdefault(kind, [])
        if len(shown) < MAX_SHOWN:
            shown.append(where)

    def left_out(self) -> dict[str, int]:
        """What index.json says of these."""
        always = {key: getattr(self, key) for key in ("empty", "binary", "bad_utf8", "malformed")}
        return always | ({"long": self.long} if self.long else {})

    def complaints(self) -> list[str]:
        """A line for each kind of problem."""
        words = {"empty": "empty files or documents left out", "binary": "binary or special files left out",
                 "bad_utf8": "documents that were not UTF-8", "malformed": "malformed lines or rows left out",
                 "long": "rows too long for a window, left out, or cut with --truncate"}
        lines = []
        for kind, places in self.problems.items():
            count = getattr(self, kind)
            of_files = kind == "empty" and not any(": " in place for place in places)  # rows say what of them is empty
            where = "" if of_files else f": {', '.join(places)}{', ...' if count > len(places) else ''}"
            lines.append(f"{count:,} {words[kind]}{where}")
        return lines

    def __str__(self) -> str:
        return f"{self.files} files: {self.empty} empty, {self.binary} binary, {self.malformed} malformed lines"

    def add(self, other: Counts) -> None:
        """Add another rank's counts."""
        for key in ("files", "documents", "empty", "binary", "bad_utf8", "malformed", "long"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        for kind, places in other.problems.items():
            self.problems[kind] = (self.problems.get(kind, []) + places)[:MAX_SHOWN]

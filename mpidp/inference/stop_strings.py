"""Finds stop strings in a text that arrives in pieces, in time proportional to the length of the text (Knuth, Morris and Pratt,
1977). Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """Finds the first occurrence of a stop string in a text. Text that may be the start of a stop string is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: the stop strings, which must be nonempty."""
        self._stops = [(stop, borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # for each stop string, the length of its longest prefix that is a suffix of the text
        self._held, self._length = deque[str](), 0  # the text that is held back, in pieces, and its length

    def add(self, piece: str) -> tuple[str, bool]:
        """Append a piece of text. Return (text, found). text: the text that certainly comes before the first stop string,
        without the text that earlier calls returned. found: whether a stop string has occurred. This string and all text after
        it are never returned."""
        starts = []
        for i, (stop, lengths) in enumerate(self._stops):
            n = self._matched[i]
            for place, character in enumerate(piece):
                while n and stop[n] != character:
                    n = lengths[n - 1]
                n += stop[n] == character
                if n == len(stop):
                    starts.append(self._length + place + 1 - n)
                    break
            self._matched[i] = n
        self._held.append(piece)
        self._length += len(piece)
        if starts:
            return self._take(min(starts)), True
        return self._take(self._length - max(self._matched, default=0)), False

    def rest(self) -> str:
        """Return the text that was held back."""
        return self._take(self._length)

    def _take(self, characters: int) -> str:
        taken = []
        self._length -= characters
        while characters:
            piece = self._held.popleft()
            taken.append(piece[:characters])
            if len(piece) > characters:
                self._held.appendleft(piece[characters:])
            characters -= len(taken[-1])
        return "".join(taken)


def borders(text: str) -> list[int]:
    """For each prefix of a text, return the length of its longest proper prefix that is also its suffix. Pure."""
    found, n = [0] * len(text), 0
    for i in range(1, len(text)):
        while n and text[i] != text[n]:
            n = found[n - 1]
        n += text[i] == text[n]
        found[i] = n
    return found

"""Passes generated text, piece by piece, to a function such as print(). A piece of text is passed on as soon as later tokens
can no longer change it. This module itself has no input or output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpidp.inference.detokenize import Detokenizer
from mpidp.inference.stop_strings import StopStrings


class StreamedText:
    """The text generated after a prompt. It is passed to the function `write` piece by piece.

    Text that may be the start of a stop string is held back until more text shows whether it is one.
    """

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str] = (), write: Callable[[str], None] | None = None
    ) -> None:
        """stops: nonempty strings. write: a function that gets each piece of text, or None to only collect the text."""
        self._detokenizer, self._stops, self._write = detokenizer, StopStrings(stops), write
        self.ids: list[int] = []
        self.stopped = False  # whether a stop string was found
        self._certain: list[str] = []

    def add(self, token: int) -> bool:
        """Append a token. Return whether the text now contains a stop string."""
        self.ids.append(token)
        text, self.stopped = self._stops.add(self._detokenizer.add(token))
        self._say(text)
        return self.stopped

    def end(self) -> str:
        """Pass the rest of the text to `write`. Return the whole text, which ends before the stop string."""
        if not self.stopped:
            self._say(self._stops.rest() + self._detokenizer.end())
        return "".join(self._certain)

    def _say(self, text: str) -> None:
        self._certain.append(text)
        if self._write is not None and text:
            self._write(text)

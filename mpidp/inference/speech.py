"""Stream generated text: characters are written as soon as they are certain. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpidp.inference.detokenize import Detokenizer


class StreamedText:
    """The text generated after a prompt, written piece by piece.

    Text that may be the start of a stop string is held back until it is certain.
    """

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str] = (), write: Callable[[str], None] | None = None
    ) -> None:
        """stops: nonempty strings; write: called with each piece of text."""
        self._detokenizer, self._stops, self._write = detokenizer, stops, write
        self.ids: list[int] = []
        self.stopped = False  # whether a stop string was found
        self._certain: list[str] = []
        self._held = ""  # the end of the text: empty, or the start of a stop string

    def add(self, token: int) -> bool:
        """Append a token. Returns True if the text now contains a stop string."""
        self.ids.append(token)
        piece = self._detokenizer.add(token)
        if not piece:
            return False
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            self._say(text[: min(places)])
            return True
        starts = (len(text) - n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        cut = min(starts, default=len(text))
        self._held = text[cut:]
        self._say(text[:cut])
        return False

    def end(self) -> str:
        """Write the rest of the text; return the whole text, without the stop string."""
        if not self.stopped:
            self._say(self._held + self._detokenizer.end())
        return "".join(self._certain)

    def _say(self, text: str) -> None:
        self._certain.append(text)
        if self._write is not None and text:
            self._write(text)

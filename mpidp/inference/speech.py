"""Stream generated text: characters are written as soon as they are certain. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class StreamedText:
    """The text generated after a prompt, written piece by piece.

    Incomplete UTF-8 characters, and text that may be the start of a stop string, are held back until they are certain.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], last: Sequence[int] = (), stops: Sequence[str] = (),
        write: Callable[[str], None] | None = None,
    ) -> None:
        """decode: returns the text of ids; last: the prompt's ids, because some tokenizers decode the first token differently;
        stops: nonempty strings; write: called with each piece of text."""
        self._decode, self._before, self._stops, self._write = decode, list(last[-1:]), stops, write
        self._skip = len(decode(self._before))
        self.ids: list[int] = []
        self.stopped = False  # whether a stop string was found
        self._text, self._written = "", 0

    def add(self, token: int) -> bool:
        """Append a token. Returns True if the text now contains a stop string."""
        self.ids.append(token)
        if not self._stops and self._write is None:
            return False
        text = self._read()
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._text = True, text[: min(places)]
            return True
        certain = text.rstrip("\ufffd")
        ends = (len(certain) - n for stop in self._stops for n in range(1, len(stop)) if certain.endswith(stop[:n]))
        self._write_up_to(certain[: min(ends, default=len(certain))])
        return False

    def end(self) -> str:
        """Write the rest of the text; return the whole text, without the stop string."""
        if not self.stopped:
            self._text = self._read()
        self._write_up_to(self._text)
        return self._text

    def _read(self) -> str:
        return self._decode(self._before + self.ids)[self._skip :]

    def _write_up_to(self, text: str) -> None:
        if self._write is not None and len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)

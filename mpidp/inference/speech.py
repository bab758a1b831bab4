"""Tokens of one text, said as soon as it is certain how they read. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Speech:
    """What a model says after a prompt. Two things are held back: what may be the first bytes of a character, and what may be the
    beginning of a text at which to stop."""

    def __init__(
        self, decode: Callable[[list[int]], str], last: Sequence[int] = (), stops: Sequence[str] = (),
        say: Callable[[str], None] | None = None,
    ) -> None:
        """decode: ids -> text; last: the prompt's last id, since some tokenizers write a text's first token otherwise; stops:
        none is empty; say: is given the text piece by piece."""
        self._decode, self._before, self._stops, self._say = decode, list(last[-1:]), stops, say
        self._skip = len(decode(self._before))
        self.ids: list[int] = []
        self.stopped = False  # at one of the stops
        self._text, self._said = "", 0

    def add(self, token: int) -> bool:
        """One more; was that the last, because a stop is complete?"""
        self.ids.append(token)
        if not self._stops and self._say is None:
            return False
        text = self._read()
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._text = True, text[: min(places)]
            return True
        certain = text.rstrip("\ufffd")
        ends = (len(certain) - n for stop in self._stops for n in range(1, len(stop)) if certain.endswith(stop[:n]))
        self._hear(certain[: min(ends, default=len(certain))])
        return False

    def end(self) -> str:
        """The whole text, without the stop; what was held back is said."""
        if not self.stopped:
            self._text = self._read()
        self._hear(self._text)
        return self._text

    def _read(self) -> str:
        return self._decode(self._before + self.ids)[self._skip :]

    def _hear(self, text: str) -> None:
        if self._say is not None and len(text) > self._said:
            self._say(text[self._said :])
            self._said = len(text)

"""Encodes a text of any length in windows (ranges of characters) of bounded size. The result equals the ids of the whole text.

If two pieces of a text are encoded separately, their ids can differ from the ids of the whole text. A tokenizer may put a
space before each piece, and a token may cross the border between the pieces. Therefore consecutive windows overlap. The cut
between two windows is at a character at which a token begins in both windows. From the cut on, both windows must have
the same tokens. The last tokens of the first window are not compared, because the end of this window may change them. Tokens
before the cut are taken from the first window, and tokens after the cut from the second window. In byte-pair encoding, a
sequence of tokens is the encoding of its text if each pair of neighbouring tokens is the encoding of the pair's text.
Therefore the result is correct.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW = 2**20  # characters that are encoded at once
OVERLAP = 2**12  # characters that two windows have in common
MAX_WINDOW = 2**24  # a window grows up to this size if no place for a cut is found
MIN_AGREED = 4  # the least number of tokens after a cut that must be equal in both windows


@dataclass(frozen=True)
class Placed:
    """The ids of a text, and the range of characters [start, stop) that each id encodes. All arrays are int64 (n,)."""

    ids: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def holds(self, start: int, stop: int) -> np.ndarray:
        """Return bool (n,), true for each token that encodes at least one of the characters [start, stop). Pure."""
        return (self.stops > start) & (self.starts < stop) & (start < stop)


Encode = Callable[[str], Placed]


def joined(encodings: list[tuple[int, Any]]) -> Placed:
    """Join the encodings of consecutive parts of a text. `encodings`: for each part, (position of its first character in the
    text, its encoding by the `tokenizers` library). Pure."""
    places = [np.array(one.offsets, dtype=np.int64).reshape(-1, 2) + at for at, one in encodings]
    ids, both = [np.array(one.ids, dtype=np.int64) for _, one in encodings], np.concatenate(places)
    return Placed(np.concatenate(ids), both[:, 0], both[:, 1])


def encode_pieces(pieces: Iterable[str], encode: Encode) -> Iterator[np.ndarray]:
    """Encode one text, which is given as consecutive pieces. A piece may end anywhere. Yield arrays whose concatenation is the
    ids of the whole text. `encode`: a function that encodes a text and returns a Placed. Independent.

    If no suitable cut is found within MAX_WINDOW characters, the text is cut at an arbitrary token. Ids near this cut may differ
    from those of the whole text.
    """
    text, given, limit = "", 0, WINDOW  # the ids of text[:given] were yielded before
    for piece in pieces:
        for at in range(0, len(piece), WINDOW):
            text += piece[at : at + WINDOW]
            if len(text) < max(limit, 2 * OVERLAP):
                continue
            placed = encode(text)
            cut = _find_cut(text, placed, encode)
            if cut is None and len(text) < MAX_WINDOW:
                limit = 2 * len(text)
                continue
            start, place = cut or _last_token(placed, len(text) - OVERLAP)
            yield placed.ids[_first(placed.starts, given) : _first(placed.starts, place)]
            text, given, limit = text[start:], place - start, WINDOW
    placed = encode(text)
    yield placed.ids[_first(placed.starts, given) :]


def _first(starts: np.ndarray, place: int) -> int:
    """Return the index of the first token that begins at character number `place` or later."""
    return int(np.argmax(starts >= place)) if place and (starts >= place).any() else len(starts) if place else 0


def _find_cut(text: str, placed: Placed, encode: Encode) -> tuple[int, int] | None:
    """Return (start, place) of a cut, or None if no cut is found. `start`: the character at which the next window begins.
    `place`: the character from which on the tokens of the next window are used."""
    for overlap in (OVERLAP, 8 * OVERLAP):
        if overlap <= len(text) // 2:
            for start in _starts_of_window(text, placed.starts, len(text) - overlap, overlap // 4):
                place = _agreement(placed, encode(text[start:]), start, len(text) - overlap // 4)
                if place is not None:
                    return start, place
    return None


def _starts_of_window(text: str, starts: np.ndarray, low: int, width: int) -> Iterator[int]:
    """Yield positions of characters near `low` at which the next window could begin. The first positions are beginnings of
    lines and words. Then beginnings of tokens follow, and then positions shortly before the first of these tokens. `starts`:
    the first character of each token. `width`: lines and words are searched for in characters [low, low + width)."""
    seen = set()
    tokens = starts[_first(starts, low) :][:8].tolist()
    lines = [text.find("\n", low, low + width) + 1, text.find(" ", low, low + width), text.find(" ", low, low + width) + 1]
    for start in [*lines, *tokens, *(token - back for token in tokens[:1] for back in range(1, 17))]:
        if start >= low - 16 and start > 0 and start not in seen:
            seen.add(start)
            yield start


def _agreement(first: Placed, second: Placed, start: int, stop: int) -> int | None:
    """Return the position of the first character from which on two windows have the same tokens, or None if there is no such
    character. Tokens that begin at character `stop` or later are not compared. Positions are counted in the first window.
    `start`: the position at which the second window begins."""
    ids, starts, stops = first.ids, first.starts, first.stops
    other_ids, other_starts = second.ids, second.starts + start
    end = _first(starts, stop)
    places = dict(zip(reversed(other_starts.tolist()), range(len(other_starts) - 1, -1, -1), strict=True))
    for i in range(max(1, _first(starts, start + 1)), end - MIN_AGREED):
        j = places.get(int(starts[i]))
        if j and starts[i - 1] < starts[i] and stops[i - 1] <= starts[i] and second.stops[j - 1] <= second.starts[j]:
            same = slice(i, end), slice(j, j + end - i)
            if np.array_equal(ids[same[0]], other_ids[same[1]]) and np.array_equal(starts[same[0]], other_starts[same[1]]):
                return int(starts[i])
    return None


def _last_token(placed: Placed, low: int) -> tuple[int, int]:
    """Return (start, place) of a cut, as _find_cut() does. Both are the beginning of the last token that begins before character
    `low`. If this token begins at 0, both are `low`."""
    place = int(placed.starts[max(0, _first(placed.starts, low) - 1)]) or low
    return place, place

"""Arranges the documents of one or more sources in one sequence of tokens. The result does not depend on the number of ranks.

A mixture takes documents from several sources in proportion to their weights. For each source, the number of tokens taken so
far is divided by the weight of the source. The next document comes from the source with the smallest quotient. The proportions
of the sources are therefore about right at every point of the mixture.

Packing puts documents into windows of a fixed number of tokens. No document crosses a window boundary. The documents are
placed one after the other. Each document goes into the first window with enough room among the last `OPEN` windows. If none of
these windows has enough room, a new window begins. The free space of a window is filled with end-of-document tokens that are
excluded from the loss. Packing needs about 100 bytes of memory per document.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_tools.cut import PIECE_TOKENS, Stream

OPEN = 64  # only this many windows, the newest, can receive further documents


def lengths_of(stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    """Return (starts, lengths) of the d documents of a stream. starts: the position of each document's first token. lengths:
    the number of tokens of each document. Both are int64 arrays (d,). Independent."""
    starts = stream.document_starts(0, stream.tokens).astype(np.int64) if stream.tokens else np.empty(0, dtype=np.int64)
    return starts, np.diff(starts, append=stream.tokens)


def mix(lengths: Sequence[np.ndarray], weights: Sequence[float], tokens: int, repeat: bool) -> tuple[np.ndarray, np.ndarray]:
    """Choose the n documents of a mixture, in order. Return (sources, indices), two int64 arrays (n,). sources: the number of
    each document's source. indices: the index of the document in this source.

    `lengths`: for each source, the lengths of its documents in tokens. Each source must have at least one document. `weights`:
    the weight of each source. The mixture ends with the document that reaches `tokens` tokens (0: no limit). It also ends when
    the next document must come from a source without further documents. With `repeat`, such a source starts again from its
    first document instead. Pure.
    """
    if len(lengths) == 1 and not tokens:
        return np.zeros(len(lengths[0]), dtype=np.int64), np.arange(len(lengths[0]))
    which: list[int] = []
    numbers: list[int] = []
    queue = [(0.0, source) for source in range(len(lengths))]
    got, taken, total = [0] * len(lengths), [0] * len(lengths), 0
    counts = [one.tolist() for one in lengths]
    while not tokens or total < tokens:
        _, source = heapq.heappop(queue)
        if taken[source] >= len(counts[source]) and not repeat:
            break
        number = taken[source] % len(counts[source])
        which.append(source)
        numbers.append(number)
        taken[source] += 1
        got[source] += counts[source][number]
        total += counts[source][number]
        heapq.heappush(queue, (got[source] / weights[source], source))
    return np.array(which, dtype=np.int64), np.array(numbers, dtype=np.int64)


def pack(lengths: np.ndarray, window: int) -> tuple[np.ndarray, int]:
    """Pack documents into windows of `window` tokens. Return (starts, total). starts: (n,) the position of each document in the
    output. total: the number of tokens of the output.

    `lengths`: (n,) the lengths of the documents, at most `window`. The total is a whole number of windows plus one token, because
    the last window needs a target for its last token. Pure.
    """
    places = np.empty(len(lengths), dtype=np.int64)
    rooms: list[list[int]] = []  # [start of the free space, number of free tokens] of each of the newest windows
    windows = 0
    for i, length in enumerate(lengths.tolist()):
        room = next((one for one in rooms if one[1] >= length), None)
        if room is None:
            room = [windows * window, window]
            windows += 1
            rooms = [*rooms, room][-OPEN:]
        places[i] = room[0]
        room[0], room[1] = room[0] + length, room[1] - length
    return places, windows * window + 1


@dataclass
class Arrangement:
    """Documents of one or more streams, arranged as one stream. The class implements the interface Tokens (cut.py)."""

    streams: Sequence[Stream]
    which: np.ndarray  # (n,) index in `streams` of each document's stream, in output order
    starts: np.ndarray  # (n,) start of each document in its stream
    lengths: np.ndarray  # (n,) number of tokens of each document
    places: np.ndarray  # (n,) start of each document in the output, ascending
    tokens: int
    eod: int  # id that fills the gaps between documents
    masked: bool = field(init=False)

    def __post_init__(self) -> None:
        self.masked = all(stream.masked for stream in self.streams)

    @classmethod
    def of(
        cls, streams: Sequence[Stream], weights: Sequence[float], tokens: int, repeat: bool, window: int, eod: int
    ) -> Arrangement:
        """Arrange the documents of `streams` in the order that mix() determines from `weights`, `tokens` and `repeat`. If
        `window` is not 0, pack the documents into windows of `window` tokens. `eod`: the id that fills the free space of the
        windows. Independent."""
        found = [lengths_of(stream) for stream in streams]
        which, numbers = mix([lengths for _, lengths in found], weights, tokens, repeat)
        starts, lengths = np.empty(len(which), dtype=np.int64), np.empty(len(which), dtype=np.int64)
        for source, (begins, sizes) in enumerate(found):
            selected = which == source
            starts[selected], lengths[selected] = begins[numbers[selected]], sizes[numbers[selected]]
        if window:
            places, total = pack(lengths, window)
            order = np.argsort(places, kind="stable")
        else:
            places, total, order = np.cumsum(lengths) - lengths, int(lengths.sum()), np.arange(len(lengths))
        return cls(streams, which[order], starts[order], lengths[order], places[order], total, eod)

    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the ids of the tokens [start, stop), as arrays of at most PIECE_TOKENS ids."""
        return self._read(start, stop, mask=False)

    def masks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the loss mask of the tokens [start, stop), as uint8 arrays of at most PIECE_TOKENS values."""
        return self._read(start, stop, mask=True)

    def _read(self, start: int, stop: int, mask: bool) -> Iterator[np.ndarray]:
        for at in range(start, stop, PIECE_TOKENS):
            end = min(at + PIECE_TOKENS, stop)
            piece = np.full(end - at, 0 if mask else self.eod, dtype=np.int64)
            first = max(0, int(np.searchsorted(self.places, at, side="right")) - 1)
            for i in range(first, int(np.searchsorted(self.places, end))):
                place, length = int(self.places[i]), int(self.lengths[i])
                low, high = max(at, place), min(end, place + length)
                if low < high:
                    begin = int(self.starts[i]) - place
                    piece[low - at : high - at] = self.streams[self.which[i]].read(begin + low, begin + high, mask)
            yield piece

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Return where documents begin among the tokens [start, stop), as uint64 positions relative to `start`."""
        low, high = np.searchsorted(self.places, [start, stop])
        return (self.places[low:high] - start).astype(np.uint64)

    def taken(self) -> list[tuple[int, int]]:
        """Return one pair per stream: (number of documents taken, number of tokens taken)."""
        return [(int((self.which == s).sum()), int(self.lengths[self.which == s].sum())) for s in range(len(self.streams))]

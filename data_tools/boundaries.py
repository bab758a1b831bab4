"""Finds the document starts in a stream of tokens, by the special tokens that end or begin documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data_tools.block_writer import BlockWriter
from mpidp.runtime.log import counted


def eod_is_first(writers: Sequence[BlockWriter], eod: int, usual: bool) -> bool:
    """Return True if the end-of-document token seems to begin documents, and False if it seems to end them.

    The result is True if more files or folders of the source begin with this token than end with it. `usual`: the result if
    both numbers are equal. Independent.
    """
    begin = end = 0
    for writer in writers:
        edges = np.unique([at for at in (*writer.parts, writer.tokens) if 0 <= at <= writer.tokens])
        begin += int(np.count_nonzero(writer.at(edges[edges < writer.tokens]) == eod))
        end += int(np.count_nonzero(writer.at(edges[edges > 0] - 1) == eod))
    return usual if begin == end else begin > end


def starts_of_parts(writer: BlockWriter, eod: int, bos: int | None, first: bool) -> Iterator[np.ndarray]:
    """Yield all document starts, as int64 arrays. If a file or folder of the source does not store its document starts,
    starts_by_ids() finds them. `eod`, `bos`, `first`: see starts_by_ids(). Independent."""
    for begin, end, known in zip(writer.parts, [*writer.parts[1:], writer.tokens], writer.known, strict=True):
        if known:
            yield writer.raw().document_starts(begin, end).astype(np.int64)
        elif begin < end:
            yield from starts_by_ids(writer.pieces(begin, end), eod, bos, first)


def starts_by_ids(pieces: Iterator[tuple[int, np.ndarray]], eod: int, bos: int | None, first: bool) -> Iterator[np.ndarray]:
    """Yield the document starts, as int64 arrays. A document starts at the first token, at each BOS, and after each
    end-of-document token. If `first` is true, a document starts at each end-of-document token instead of after it. `pieces`:
    the tokens in order, as pairs (position of the first token, ids). `eod`, `bos`: ids of the two special tokens. Pure."""
    last = None
    for at, ids in pieces:
        found = ids == eod if first else np.concatenate([[last in (None, eod)], ids[:-1] == eod])
        if bos is not None and bos != eod:
            found = found | (ids == bos)
        found[0] |= last is None
        last = int(ids[-1])
        yield np.flatnonzero(found) + at


def occurs(writers: Sequence[BlockWriter], eod: int, bos: int | None) -> bool:
    """Return whether any token in the files of `writers` is the end-of-document token or BOS. Independent."""
    return any((ids == eod).any() or bos is not None and (ids == bos).any() for writer in writers for _, ids in writer.pieces())


def unended(writers: Sequence[BlockWriter], eod: int) -> list[str]:
    """Return a list with one remark if some documents do not end with the end-of-document token, else []. Independent."""
    total = ended = 0
    for writer in writers:
        for starts in writer.start_pieces():
            total += len(starts)
            ended += int(np.count_nonzero(writer.at(starts[starts > 0] - 1) == eod))
        ended += int(np.count_nonzero(writer.at(np.array([writer.tokens - 1])) == eod))
    if ended == total:
        return []
    return [f"{total - ended:,} of {counted(total, 'document')} do not end with the end-of-document token, id {eod}"]


def alone(writers: Sequence[BlockWriter], eod: int) -> list[str]:
    """Return a list with one remark if some documents consist only of the end-of-document token, else []. Independent."""
    total = found = 0
    for writer in writers:
        for starts in writer.start_pieces():
            total += len(starts)
            found += int(np.count_nonzero(writer.at(starts[:-1][np.diff(starts) == 1]) == eod))
    if not found:
        return []
    return [f"{found:,} of {counted(total, 'document')} contain only the end-of-document token, id {eod}. Perhaps the "
            "token was used as padding, or was written both before and after each document"]

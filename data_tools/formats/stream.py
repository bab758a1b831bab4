"""Reads the tokens of one split of shards as blocks (see blocks.py). The writers of all formats use SplitTokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from data_tools.formats.blocks import BLOCK_TOKENS, TokenBlock
from data_tools.progress import Ticker
from mpidp.data.shards import TokenStream


class SplitTokens:
    """One split of shards. blocks() yields its tokens, and counts the tokens and documents that it yields. Independent."""

    def __init__(self, stream: TokenStream, bos: int | None, ticker: Ticker) -> None:
        """`stream`: the tokens of the split. `bos`: the id of BOS, which may begin documents, or None."""
        self.split, self.dtype, self.vocab_size = stream.split, stream.dtype, stream.vocab_size
        self.has_loss_mask, self.tokenizer_kind = stream.has_loss_mask, stream.index.tokenizer_kind
        self._stream, self._bos, self._ticker = stream, bos, ticker
        self.tokens = self.documents = 0
        self.lost = 0  # number of places where special tokens and document starts do not agree

    def blocks(self) -> Iterator[TokenBlock]:
        """Yield all tokens with their document starts and loss mask.

        The first token of the split always starts a document, even if its document began in the previous split. In packed shards
        (Index.window), the end-of-document tokens that fill windows are left out. Raises DataError if an id is not smaller than
        the vocabulary size.
        """
        stream, window = self._stream, self._stream.index.window
        size = max(1, BLOCK_TOKENS // window) * window if window else BLOCK_TOKENS
        last = np.empty(0, stream.dtype)  # the last token before a block
        end = stream.num_tokens - (window > 0)
        for at in range(0, end, size):
            count = min(size, end - at)
            ids, mask, begins = stream.read(at, count), stream.read_mask(at, count), stream.read_starts(at, count)
            stream.check_ids(at, ids)
            begins[0] |= at == 0
            block = TokenBlock(ids, np.flatnonzero(begins), None if mask is None else mask.astype(np.uint8))
            block = _without_fill(block, stream.eod) if window else block
            assert block.starts is not None
            last = self._count(block, last)
            self._ticker.add(len(block.starts), block.ids.nbytes)
            yield block

    def _count(self, block: TokenBlock, last: np.ndarray) -> np.ndarray:
        starts = np.zeros(len(block.ids), dtype=np.bool_)
        starts[block.starts] = True
        before = np.concatenate([last, block.ids])[: len(block.ids)] == self._stream.eod
        if len(last) or not len(block.ids):
            expected = before
        else:
            expected = np.concatenate([[True], before[: len(block.ids) - 1]])
        if self._bos is not None:
            expected = expected | (block.ids == self._bos)
        self.lost += int(np.count_nonzero(expected != starts))
        self.tokens, self.documents = self.tokens + len(block.ids), self.documents + int(np.count_nonzero(starts))
        return block.ids[-1:] if len(block.ids) else last


def _without_fill(block: TokenBlock, eod: int) -> TokenBlock:
    """Return a block of packed shards without the end-of-document tokens that fill windows. A token fills a window if it is at
    the end of a document, follows another end-of-document token, and is not in the loss."""
    ids, starts, mask = block.ids, block.starts, block.mask
    assert starts is not None
    fill = ids == eod if mask is None else (ids == eod) & (mask == 0)
    fill[1:] &= ids[:-1] == eod
    fill[starts] = False
    last = np.maximum.reduceat(np.where(fill, -1, np.arange(len(ids))), starts)  # last token of each document that is not fill
    kept = np.arange(len(ids)) <= np.repeat(last, np.diff(starts, append=len(ids)))
    moved = np.concatenate([[0], np.cumsum(kept)])[starts]
    return TokenBlock(ids[kept], moved, None if mask is None else mask[kept])


def whole_documents(blocks: Iterable[TokenBlock]) -> Iterator[TokenBlock]:
    """Yield the same tokens in blocks of whole documents. The longest document must fit in memory. Pure."""
    parts: list[TokenBlock] = []  # parts of the document that has not ended
    for block in blocks:
        assert block.starts is not None
        if len(block.starts) and parts:
            first = int(block.starts[0])
            yield _joined([*parts, _cut(block, 0, first)])
            block, parts = _cut(block, first, len(block.ids)), []
        last = int(block.starts[-1]) if block.starts is not None and len(block.starts) else 0
        if last:
            yield _cut(block, 0, last)
            block = _cut(block, last, len(block.ids))
        parts.append(block)
    if parts:
        yield _joined(parts)


def _cut(block: TokenBlock, low: int, high: int) -> TokenBlock:
    assert block.starts is not None
    starts = block.starts[(block.starts >= low) & (block.starts < high)] - low
    return TokenBlock(block.ids[low:high], starts, None if block.mask is None else block.mask[low:high])


def _joined(parts: list[TokenBlock]) -> TokenBlock:
    masks = [part.mask for part in parts if part.mask is not None]
    ids = np.concatenate([part.ids for part in parts])
    return TokenBlock(ids, np.zeros(1, np.int64), np.concatenate(masks) if masks else None)

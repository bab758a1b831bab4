"""Encodes text documents or training rows, and writes the ids to raw files (see cut.py). Training rows also get a loss
mask."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_tools.cut import Raw, RawWriter
from data_tools.files import SourceFile
from data_tools.rows import RowReader, TrainingRow
from data_tools.sources import SourceReader
from mpidp.data.encoder import Encoder
from mpidp.data.long_text import WINDOW, Placed
from mpidp.data.tokenizer import token_dtype

T = TypeVar("T")
BATCH_CHARACTERS = 2**20  # number of characters that are encoded at once
MAX_CHARACTERS = 64  # a row is cut if it has more characters than this times the number of tokens of a window


@dataclass(frozen=True)
class Routing:
    """Assigns each document of one source to a stream (train or val), and names the raw files of a rank."""

    scratch: Path
    source: int
    rank: int
    val_share: float  # share of the documents for validation; 0: all documents go to one stream
    seed: int

    def writers(self, dtype: np.dtype[Any], masked: bool) -> dict[str, RawWriter]:
        """Return {stream's name: writer}. `masked`: whether the streams have a loss mask. Independent."""
        names = ("train", "val") if self.val_share else ("train",)
        return {name: RawWriter(self.scratch, f"{name}-{self.source}-{self.rank}", dtype, masked) for name in names}

    def stream(self, file: SourceFile, number: int) -> str:
        """Return the name of the stream to which document `number` of a file belongs. The result does not depend on other
        documents. Pure."""
        return "val" if self.val_share and _drawn(self.seed, file.name, number) < self.val_share else "train"


def _drawn(seed: int, name: str, number: int) -> float:
    """Return a pseudorandom number in [0, 1) for document `number` of the file `name`."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{number}".encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


@dataclass(frozen=True)
class Document:
    """A document of a source. A document of more than WINDOW characters is divided: `text` is its beginning, and `rest` yields
    the other parts. Read these parts before the next document. If the document is shorter, `rest` is None."""

    stream: str
    text: str
    rest: Iterator[str] | None

    def __len__(self) -> int:
        return len(self.text) if self.rest is None else BATCH_CHARACTERS


def encode_text(files: list[SourceFile], reader: SourceReader, encoder: Encoder, routing: Routing) -> dict[str, Raw]:
    """Encode a rank's text files. Return {stream's name: raw files}. Independent."""
    eod = encoder.tokenizer.eod
    writers = routing.writers(token_dtype(encoder.tokenizer.vocab_size), masked=False)
    for batch in _batches(_documents(files, reader, encoder, routing), len):
        whole = iter(encoder.batch([document.text for document in batch if document.rest is None]))
        for document in batch:
            pieces = [next(whole)] if document.rest is None else encoder.pieces(chain([document.text], document.rest))
            writer, last = writers[document.stream], -1
            for number, ids in enumerate(pieces):
                writer.add(ids if number else encoder.begins(ids))
                last = ids[-1] if len(ids) else last
            writer.end_document_with(np.array([] if last == eod else [eod]))
    return {name: writer.close() for name, writer in writers.items()}


def _documents(files: list[SourceFile], reader: SourceReader, encoder: Encoder, routing: Routing) -> Iterator[Document]:
    for file in files:
        number = 0
        pieces = _named(reader, encoder, file)
        for piece in pieces:
            texts, characters, last = [piece or ""], len(piece or ""), piece
            rest = iter(partial(next, pieces), None)  # the other pieces of this document
            while last is not None and characters <= WINDOW:
                last = next(rest, None)
                texts.append(last or "")
                characters += len(texts[-1])
            yield Document(routing.stream(file, number), "".join(texts), rest if last is not None else None)
            number += 1  # noqa: SIM113 - a document may have several pieces


def _named(reader: SourceReader, encoder: Encoder, file: SourceFile) -> Iterator[str | None]:
    """Yield the pieces of a file, with None at the end of each document. Count the documents whose text contains the name of a
    special token."""
    number, named = 0, False
    for text in reader.pieces(file):
        if text is not None and not named and encoder.names is not None and (found := encoder.names.search(text)):
            named = True
            reader.counts.note("special", f"{file.path}: document {number + 1} names {found[0]}")
        if text is None:
            number, named = number + 1, False
        yield text


def _batches(pieces: Iterator[T], characters_of: Callable[[T], int]) -> Iterator[list[T]]:
    batch: list[T] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += characters_of(piece) + 1
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def encode_rows(
    files: list[SourceFile], reader: RowReader, encoder: Encoder, routing: Routing, max_tokens: int, truncate: bool
) -> dict[str, Raw]:
    """Encode a rank's rows. Return {stream's name: raw files}. Independent.

    Each row becomes a document of at most `max_tokens` tokens. Longer rows are truncated if `truncate` is true, and skipped
    otherwise. To bound the memory, only the first max(WINDOW, MAX_CHARACTERS * max_tokens) characters of a row's text are
    encoded. A row with more characters counts as too long.
    """
    limit = max(WINDOW, MAX_CHARACTERS * max_tokens)
    writers = routing.writers(token_dtype(encoder.tokenizer.vocab_size), masked=True)
    rows = (
        (routing.stream(file, number), row.beginning(limit)) for file in files for number, row in enumerate(reader.rows(file))
    )
    for batch in _batches(rows, lambda piece: len(piece[1].text)):
        for (name, row), placed in zip(batch, encoder.placer([row.text for _, row in batch]), strict=True):
            ids, mask = _tokens(row, placed, encoder)
            is_long, size = row.cut or len(ids) > max_tokens, f"{'over ' * row.cut}{len(ids)} tokens"
            if is_long and truncate:
                reader.counts.note("long", f"{row.place}: {size}")
                ids, mask = ids[:max_tokens], mask[:max_tokens]
            if is_long and not truncate:
                reader.skip("long", row.place, f"{size}, more than --seq-len {max_tokens}; --truncate shortens such rows")
            elif not mask.any():
                reader.skip("empty", row.place, f"no token to train on among its first {max_tokens} tokens")
            else:
                if encoder.names is not None and (found := encoder.names.search(row.said)):
                    reader.counts.note("special", f"{row.place}: names {found[0]}")
                writers[name].add_document(ids, mask)
                reader.counts.documents += 1
    return {name: writer.close() for name, writer in writers.items()}


def _tokens(row: TrainingRow, placed: Placed, encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, loss mask) of a row. A token is in the loss if it contains a character of a span of the row.

    BOS is inserted at the start if documents begin with BOS and the row does not. An end-of-document token is appended if the
    row does not end with one. The appended token is in the loss if the row ends with text in the loss. There is one exception:
    if this text already ends with an end-of-document token and white space, the appended token is not in the loss. The first
    token is never in the loss, because no token precedes it.
    """
    ids, eod, ends = placed.ids, encoder.tokenizer.eod, encoder.table.ends
    mask = np.zeros(len(ids), dtype=np.uint8)
    for start, stop in row.spans:
        held = np.flatnonzero(placed.holds(start, stop))
        mask[held] = 1
        after = int(held[-1]) + 1 if len(held) else int(np.searchsorted(placed.starts, start))  # an empty turn holds no token
        if row.unmarked and after < len(ids) and ids[after] in ends and not np.isin(ids[held], ends).any():
            mask[after] = 1  # the token that ends the turn; it is not in the span if it is written only before another message
    if not len(ids) or ids[-1] != eod:
        learned_ends = placed.stops[(ids == eod) & (mask > 0)]
        ended = len(learned_ends) > 0 and not row.text[learned_ends[-1] :].strip()
        ids, mask = np.append(ids, eod), np.append(mask, np.uint8(row.ends and not ended))
    begun = encoder.begins(ids)
    mask = np.insert(mask, 0, 0) if len(begun) > len(ids) else mask
    mask[0] = 0
    return begun, mask

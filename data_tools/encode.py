"""From files to raw streams of tokens: the documents of text, or rows of which a part is learned."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_tools.cut import Raw, RawWriter
from data_tools.places import placer
from data_tools.rows import Row, RowReader
from data_tools.sources import Reader, SourceFile
from mpidp.data.tokenizer import Tokenizer, token_dtype

T = TypeVar("T")
BATCH_CHARACTERS = 2**20  # encoded at once


@dataclass(frozen=True)
class Routing:
    """Where a rank's documents of one source go."""

    scratch: Path
    source: int
    rank: int
    val_share: float  # of the documents; 0: all go to one stream
    seed: int

    def writers(self, dtype: np.dtype[Any], masked: bool) -> dict[str, RawWriter]:
        """By stream. Independent."""
        names = ("train", "val") if self.val_share else ("train",)
        return {name: RawWriter(self.scratch, f"{name}-{self.source}-{self.rank}", dtype, masked) for name in names}

    def stream(self, file: SourceFile, number: int) -> str:
        """Of document `number` of a file, whatever else is in the corpus. Pure."""
        return "val" if self.val_share and _drawn(self.seed, file.name, number) < self.val_share else "train"


def _drawn(seed: int, name: str, number: int) -> float:
    """A number in [0, 1) for a document."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{number}".encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def encode_text(files: list[SourceFile], reader: Reader, encoder: Tokenizer, routing: Routing) -> dict[str, Raw]:
    """A rank's files as raw files, by stream. Independent."""
    writers = routing.writers(token_dtype(encoder.vocab_size), masked=False)
    for batch in _batches(_routed(files, reader, routing), lambda piece: len(piece[1] or "")):
        encoded = iter(encoder.encode_batch([text for _, text in batch if text is not None]))
        for name, text in batch:
            if text is None:
                writers[name].end_document(encoder.eod)
            else:
                writers[name].add(next(encoded))
    return {name: writer.close() for name, writer in writers.items()}


def _routed(files: list[SourceFile], reader: Reader, routing: Routing) -> Iterator[tuple[str, str | None]]:
    """Each piece of text (None: the end of a document) with the stream that it belongs to."""
    for file in files:
        number = 0
        for text in reader.pieces(file):
            yield routing.stream(file, number), text
            number += text is None


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
    files: list[SourceFile], reader: RowReader, encoder: Tokenizer, routing: Routing, most: int, truncate: bool
) -> dict[str, Raw]:
    """The same of rows, each a document of at most `most` tokens; longer ones are cut, or left out. Independent."""
    writers = routing.writers(token_dtype(encoder.vocab_size), masked=True)
    encode = placer(encoder) if reader.template is not None else None
    rows = ((routing.stream(file, number), row) for file in files for number, row in enumerate(reader.rows(file)))
    for batch in _batches(rows, lambda piece: sum(len(text) for text, _ in piece[1].parts)):
        texts = [text for _, row in batch for text, _ in row.parts]
        if encode is not None:
            encoded = iter(encode(texts))
        else:  # a part is learned as a whole, or not at all
            encoded = ((ids, np.zeros(len(ids), dtype=np.int64)) for ids in encoder.encode_batch(texts))
        for name, row in batch:
            ids, mask = _tokens(row, encoded, encoder.eod)
            if len(ids) > most and truncate:
                reader.counts.note("long", f"{row.place}: {len(ids)} tokens")
                ids, mask = ids[:most], mask[:most]
            if len(ids) > most:
                reader.bad("long", row.place, f"{len(ids)} tokens, more than --seq-len {most}; or --truncate")
            elif not mask.any():
                reader.bad("empty", row.place, f"no token to learn among its first {most}")
            else:
                writers[name].add_document(ids, mask)
                reader.counts.documents += 1
    return {name: writer.close() for name, writer in writers.items()}


def _tokens(row: Row, encoded: Iterator[tuple[np.ndarray, np.ndarray]], eod: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, which of them are learned) of a row, with an end-of-document token where it has none. It is learned after what is
    learned, unless a template has said the end there already. A first token has nothing that foretells it."""
    ids, masks = [], []
    for (_, spans), (found, places) in zip(row.parts, encoded, strict=False):  # the rest is other rows'
        ids.append(found)
        masks.append(np.zeros(len(found), dtype=np.uint8))
        for start, stop in spans:
            masks[-1][(places >= start) & (places < stop)] = 1
    all_ids, mask = np.concatenate(ids), np.concatenate(masks)
    if not len(all_ids) or all_ids[-1] != eod:
        learned = row.ends and not (all_ids[mask > 0] == eod).any()
        all_ids, mask = np.append(all_ids, eod), np.append(mask, np.uint8(learned))
    mask[0] = 0
    return all_ids, mask

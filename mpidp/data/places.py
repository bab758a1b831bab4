"""Encode text and return, for each token, the characters that it holds. This maps spans of characters to tokens.

With special="tokens", the names of special tokens in the text ("<|im_end|>") become their ids, as in transformers. With "text"
they stay text, as in Tokenizer.encode.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidp.data.long_text import encode_pieces
from mpidp.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer


@dataclass(frozen=True)
class Placed:
    """The ids of a text, and the characters [start, stop) of each: int64 (n,) each."""

    ids: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def holds(self, start: int, stop: int) -> np.ndarray:
        """Return which tokens hold any of the characters [start, stop), bool (n,). Pure."""
        return (self.stops > start) & (self.starts < stop)


def placer(tokenizer: Tokenizer, special: str) -> Callable[[list[str]], list[Placed]]:
    """Return a function that encodes several texts with this tokenizer. special: "tokens" or "text". Independent."""
    if isinstance(tokenizer, ByteTokenizer):
        return lambda texts: [_single(tokenizer.encode(text), _of_bytes(text)) for text in texts]
    if isinstance(tokenizer, CharTokenizer):
        return lambda texts: [_single(tokenizer.encode(text), np.arange(len(text))) for text in texts]
    return _hugging_face(tokenizer, special == "tokens")


def ids_of_pieces(pieces: Iterable[str], encode: Callable[[list[str]], list[Placed]]) -> Iterator[np.ndarray]:
    """Encode a text that is given in pieces, cut anywhere. Yield the ids of the whole text in parts.

    encode: a result of placer(). Independent."""

    def one(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        placed = encode([text])[0]
        return placed.ids, placed.starts, placed.stops

    return encode_pieces(pieces, one)


def _single(ids: np.ndarray, places: np.ndarray) -> Placed:
    return Placed(ids, places, places + 1)


def _of_bytes(text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    lengths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.repeat(np.arange(len(text)), lengths)


def _hugging_face(tokenizer: Tokenizer, special: bool) -> Callable[[list[str]], list[Placed]]:
    from tokenizers import Tokenizer as Library

    about = json.loads(tokenizer.to_json())
    about["post_processor"] = None  # a post-processor may add BOS, and may exclude spaces from offsets
    library: Any = Library.from_str(json.dumps(about))
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = not special
    end = str(library.id_to_token(tokenizer.eod))

    def encode(texts: list[str]) -> list[Placed]:
        found = [_placed([(0, one)]) for one in library.encode_batch(texts, add_special_tokens=False)]
        if not special:  # an end-of-document token that is not flagged as special is still found in a text
            for i, text in enumerate(texts):
                if end in text and len(end) > 1 and (found[i].ids == tokenizer.eod).any():
                    found[i] = _placed([(at, library.encode(part, add_special_tokens=False)) for at, part in _divided(text, end)])
        return found

    return encode


def _placed(encodings: list[tuple[int, Any]]) -> Placed:
    """Join the encodings of consecutive parts of a text; each comes with the place of its first character."""
    ids = [i for _, one in encodings for i in one.ids]
    places = [(at + start, at + stop) for at, one in encodings for start, stop in one.offsets]
    array = np.array(places, dtype=np.int64).reshape(-1, 2)
    return Placed(np.array(ids, dtype=np.int64), array[:, 0], array[:, 1])


def _divided(text: str, name: str) -> list[tuple[int, str]]:
    """Divide a text in the middle of each occurrence of a name; return (place, part)."""
    cuts, at = [0], text.find(name)
    while at >= 0:
        cuts.append(at + len(name) // 2)
        at = text.find(name, cuts[-1])
    return [(a, text[a:b]) for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]

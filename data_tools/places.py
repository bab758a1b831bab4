"""Encode text and return, for each token, the character at which the token begins. This maps spans of characters to tokens.

Special tokens in the text ("<|im_end|>") become ids, because a chat template wrote the text. As in transformers, a special
token in a message is encoded in the same way. Only the template can prevent this.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from mpidp.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

Placed = tuple[np.ndarray, np.ndarray]  # ids, and the character at which each id begins: int64 (n,) each


def placer(tokenizer: Tokenizer) -> Callable[[list[str]], list[Placed]]:
    """Return a function that encodes several texts with this tokenizer. Independent."""
    if isinstance(tokenizer, ByteTokenizer):
        return lambda texts: [(tokenizer.encode(text), _of_bytes(text)) for text in texts]
    if isinstance(tokenizer, CharTokenizer):
        return lambda texts: [(tokenizer.encode(text), np.arange(len(text))) for text in texts]
    return _hugging_face(tokenizer.to_json())


def _of_bytes(text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    lengths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.repeat(np.arange(len(text)), lengths)


def _hugging_face(stored: str) -> Callable[[list[str]], list[Placed]]:
    from tokenizers import Tokenizer as Library

    about = json.loads(stored)
    about["post_processor"] = None  # it would add BOS, which templates write, and may exclude spaces from offsets
    library: Any = Library.from_str(json.dumps(about))
    library.no_truncation()
    library.no_padding()

    def encode(texts: list[str]) -> list[Placed]:
        found = library.encode_batch(texts, add_special_tokens=False)
        return [
            (np.array(one.ids, dtype=np.int64), np.array([start for start, _ in one.offsets], dtype=np.int64)) for one in found
        ]

    return encode

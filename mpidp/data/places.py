"""Encodes text, and finds the characters that each token encodes.

With special="tokens", names of special tokens in the text, such as "<|im_end|>", become the tokens' ids, as in transformers. With
special="text", these names are encoded as plain text, as in Tokenizer.encode().
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from mpidp.data.long_text import Placed, joined
from mpidp.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, placed_without


def placer(tokenizer: Tokenizer, special: str) -> Callable[[list[str]], list[Placed]]:
    """Return a function that encodes several texts with this tokenizer. The function returns a `Placed` object for each text.
    `special`: whether names of special tokens in a text become their ids ("tokens") or are plain text ("text"). Independent."""
    if isinstance(tokenizer, ByteTokenizer):
        return lambda texts: [_single(tokenizer.encode(text), _of_bytes(text)) for text in texts]
    if isinstance(tokenizer, CharTokenizer):
        return lambda texts: [_single(tokenizer.encode(text), np.arange(len(text))) for text in texts]
    return _hugging_face(tokenizer, special == "tokens")


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

    def encode(texts: list[str]) -> list[Placed]:
        found = [joined([(0, one)]) for one in library.encode_batch(texts, add_special_tokens=False)]
        if not special:  # an end-of-document token that is not flagged as special is still found in a text
            for i, text in enumerate(texts):
                if (found[i].ids == tokenizer.eod).any():
                    found[i] = placed_without(library, text, tokenizer.eod)
        return found

    return encode

"""The UTF-8 bytes of each token. They are used to compute bits per byte, and to decode tokens one by one. Pure.

The supported tokenizers are mpidp's byte and char tokenizers, byte-level BPE, and SentencePiece with or without byte fallback.
The end-of-document token has no bytes, because it is not part of a text. Other added tokens have the bytes of their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from mpidp.data.fast_bpe import byte_names
from mpidp.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
METASPACE = "\u2581"


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of each id of a tokenizer. The bytes of an id without a token are empty."""

    of: list[bytes]  # of[i]: the bytes of id i
    begin: bool = False  # whether the tokenizer puts a space before each text; this space is not part of the text
    stripped: bool = False  # whether decoding removes this space
    added: frozenset[int] = frozenset()  # ids after which the tokenizer also puts such a space
    bos: int | None = None  # the BOS id, which has no bytes at the beginning of a text

    def count(self, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Return the number of bytes of each id, int64 (n,). `starts`: (n,) bool, true for the first token of each text."""
        if self.bos is None and not self.begin:
            return self._lengths[ids]
        opens = starts & (ids == self.bos)
        found = np.where(opens, 0, self._lengths[ids])
        if not self.begin:
            return found
        first = starts.copy()
        first[1:] |= opens[:-1]
        if self.added:
            first[1:] |= self._is_added[ids[:-1]]
        return found - (first & self._spaced[ids])

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(data) for data in self.of], dtype=np.int64)

    @cached_property
    def _spaced(self) -> np.ndarray:
        return np.array([data.startswith(b" ") for data in self.of], dtype=np.bool_)

    @cached_property
    def _is_added(self) -> np.ndarray:
        return np.isin(np.arange(len(self.of)), list(self.added))


@lru_cache(maxsize=4)
def bytes_of_tokens(tokenizer: Tokenizer) -> TokenBytes | None:
    """Return the bytes of each id. Return None if mpidp does not support the decoder of this tokenizer. Independent."""
    if isinstance(tokenizer, ByteTokenizer):
        return TokenBytes([*(bytes([i]) for i in range(256)), b""])
    if isinstance(tokenizer, CharTokenizer):
        return TokenBytes([*(c.encode() for c in tokenizer.characters), b""])
    parsed = json.loads(tokenizer.to_json())
    steps = list(_nested(parsed.get("decoder"), "decoders"))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        byte_of = {name: byte for byte, name in enumerate(byte_names())}
        found = [bytes(byte_of[c] for c in token) if set(token) <= byte_of.keys() else token.encode()
                 for token in _vocabulary(parsed, tokenizer.vocab_size)]
    elif kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and all(map(_is_plain, steps)):
        falls_back = "ByteFallback" in kinds
        found = [_sentencepiece(token, steps, falls_back) for token in _vocabulary(parsed, tokenizer.vocab_size)]
    else:
        return None
    listed = {token["id"]: token["content"] for token in parsed.get("added_tokens") or []}
    added = {i: content for i, content in listed.items() if i < len(found)}  # the library may change other ids
    for i, content in added.items():
        found[i] = content.encode()
    found[tokenizer.eod] = b""
    begin, again = _prefix(parsed)
    stripped = any(step["type"] == "Strip" or (step["type"] == "Metaspace" and _scheme(step) != "never") for step in steps)
    return TokenBytes(found, begin, stripped, frozenset(added) if again else frozenset(), tokenizer.bos)


def _nested(part: Any, key: str) -> Iterable[dict[str, Any]]:
    """Yield the steps of `part`, which is a decoder, a normalizer or a pre-tokenizer. If its type is "Sequence", `part` has a
    list of steps. Otherwise, `part` is the only step. `key`: the key of the list of steps."""
    if not isinstance(part, dict):
        return
    if part.get("type") != "Sequence":
        yield part
    for step in part.get(key) or [] if part.get("type") == "Sequence" else []:
        yield from _nested(step, key)


def _vocabulary(parsed: dict[str, Any], size: int) -> list[str]:
    vocab, found = parsed["model"]["vocab"], [""] * size
    for token, i in vocab.items() if isinstance(vocab, dict) else ((one[0], i) for i, one in enumerate(vocab)):
        found[i] = token
    return found


def _is_plain(step: dict[str, Any]) -> bool:
    """Return whether _sentencepiece() supports this step of a decoder."""
    if step["type"] == "Replace":
        return "String" in step["pattern"]
    return step["type"] != "Strip" or (step["content"], step["start"], step["stop"]) == (" ", 1, 0)


def _sentencepiece(token: str, steps: list[dict[str, Any]], falls_back: bool) -> bytes:
    if falls_back and (byte := BYTE_TOKEN.fullmatch(token)):
        return bytes([int(byte[1], 16)])
    for step in steps:
        if step["type"] == "Replace":
            token = token.replace(step["pattern"]["String"], step["content"])
        elif step["type"] == "Metaspace":
            token = token.replace(step.get("replacement", METASPACE), " ")
    return token.encode()


def _prefix(parsed: dict[str, Any]) -> tuple[bool, bool]:
    """Return (first, again). first: whether encoding puts a space before a text. again: whether encoding also puts a space
    after each added token in a text. `parsed`: the contents of tokenizer.json."""
    first = again = False
    for step in [*_nested(parsed.get("normalizer"), "normalizers"), *_nested(parsed.get("pre_tokenizer"), "pretokenizers")]:
        if step["type"] == "Prepend":
            again |= step["prepend"] in (METASPACE, " ")
        elif step["type"] == "ByteLevel":
            again |= bool(step.get("add_prefix_space", True))
        elif step["type"] == "Metaspace":
            first, again = first or _scheme(step) == "first", again or _scheme(step) == "always"
    return first or again, again


def _scheme(step: dict[str, Any]) -> str:
    """Return where a Metaspace step adds a space in encoding, and removes it in decoding. The added tokens in a text divide
    it into parts. "always": before each part. "first": before the first part. "never": nowhere."""
    return str(step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never"))

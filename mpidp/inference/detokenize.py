"""Decodes generated tokens one after the other. Pure.

A character of several bytes may be spread over several tokens. Its bytes are kept until the character is complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from mpidp.data.token_bytes import TokenBytes, bytes_of_tokens
from mpidp.data.tokenizer import Tokenizer

CONTEXT = 8  # number of earlier tokens that are decoded again with each new token, if the bytes of tokens are unknown


class Detokenizer(Protocol):
    """Decodes the tokens that follow a prompt."""

    def add(self, token: int) -> str:
        """Return the text that this token completes, which may be empty."""

    def end(self) -> str:
        """Return the text that add() has held back, which may be empty. If the last character is incomplete, it becomes
        U+FFFD."""


def detokenizer_of(tokenizer: Tokenizer, prompt: Sequence[int]) -> Detokenizer:
    """Return a `Detokenizer` object for the tokens that follow the ids `prompt`. Independent."""
    of = bytes_of_tokens(tokenizer)
    return _Windowed(tokenizer, prompt) if of is None else _Bytewise(of, all(i in (tokenizer.eod, tokenizer.bos) for i in prompt))


class _Bytewise:
    """Decodes the tokens by joining their bytes. begins: whether no text precedes these tokens. If True, the space that the
    tokenizer puts before each text is removed."""

    def __init__(self, of: TokenBytes, begins: bool) -> None:
        self._of, self._begins = of, begins and of.stripped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        data = self._of.of[token] if 0 <= token < len(self._of.of) else b""
        if self._begins and data:
            data, self._begins = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Windowed:
    """Decodes each token together with the last tokens before it, because a tokenizer may decode the first token of a text
    differently."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._decode, self._before, self._new = tokenizer.decode, list(prompt[-CONTEXT:]), list[int]()

    def add(self, token: int) -> str:
        self._new.append(token)
        text = self._read()
        if text.endswith("\ufffd") and len(self._new) < CONTEXT:
            return ""
        self._before, self._new = (self._before + self._new)[-CONTEXT:], []
        return text

    def end(self) -> str:
        return self._read()

    def _read(self) -> str:
        return self._decode(self._before + self._new)[len(self._decode(self._before)) :]

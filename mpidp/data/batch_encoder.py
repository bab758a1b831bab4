"""Encodes texts with a Hugging Face tokenizer. The first texts are encoded with the `tokenizers` library. If tiktoken gives the
same ids, later texts are encoded with tiktoken, because it is faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpidp.data.fast_bpe import FastBPE, NotEqual
from mpidp.data.long_text import Placed, joined

# Before tiktoken starts, the library encodes CHARACTERS + CHARACTERS_PER_TOKEN x (vocabulary size) characters. With less text,
# the checks would take longer than tiktoken saves.
CHARACTERS = 2**19
CHARACTERS_PER_TOKEN = 64


class BatchEncoder:
    """Encodes texts with the `tokenizers` library or with tiktoken. Both programs give the same ids. Names of special tokens in a
    text are encoded like any other text.

    `program`: the program that encodes: "tiktoken", or "the tokenizers library" and the reason why it is not tiktoken. Before the
    program is chosen, it is "".
    """

    def __init__(self, text: str, library: Any) -> None:
        """`text`: the contents of a tokenizer.json. `library`: the same tokenizer, as an object of the `tokenizers` library."""
        self.program = ""
        self._text, self._library = text, library
        self._left = CHARACTERS + CHARACTERS_PER_TOKEN * library.get_vocab_size()
        self._fast: FastBPE | None = None

    def batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int64 (n,). Independent."""
        if self._fast is not None:
            try:
                return self._fast.encode_batch(texts)
            except NotEqual as reason:
                self._stop(reason)
        encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        found = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        self._count(texts, found)
        return found

    def placed(self, text: str) -> Placed:
        """Return the ids of a text, and for each id the range of characters that it encodes. Independent."""
        if self._fast is not None:
            try:
                return self._fast.placed(text)
            except NotEqual as reason:
                self._stop(reason)
        found = joined([(0, self._library.encode(text, add_special_tokens=False))])
        self._count([text], [found.ids])
        return found

    def _count(self, texts: Sequence[str], found: list[np.ndarray]) -> None:
        """Count the characters of `texts`, which the `tokenizers` library has encoded. When enough characters have been
        counted, encode `texts` with tiktoken, too, and use tiktoken from now on if it gives the same ids. `found`: the
        library's ids of each text."""
        before, self._left = self._left, self._left - sum(map(len, texts))
        if before > 0 >= self._left:
            try:
                fast = FastBPE(self._text, self._library)
                if not all(map(np.array_equal, fast.encode_batch(texts), found)):
                    raise NotEqual("tiktoken gives different ids for a sample of the text")
                self._fast, self.program = fast, "tiktoken"
            except NotEqual as reason:
                self._stop(reason)

    def _stop(self, reason: NotEqual) -> None:
        self._fast, self.program = None, f"the tokenizers library ({reason})"

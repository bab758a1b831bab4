"""Encodes texts with a tokenizer, and adds the beginning-of-sequence token (BOS). The commands prepare, generate and evaluate
use this module, so that they encode in the same way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpidp.data.long_text import Placed, encode_pieces
from mpidp.data.places import placer
from mpidp.data.special_tokens import SpecialTokens, special_names
from mpidp.data.tokenizer import Tokenizer
from mpidp.errors import DataError


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and the special tokens of the training data. Encoding raises DataError if a character has no id."""

    tokenizer: Tokenizer
    table: SpecialTokens
    special: str = "text"  # "tokens": names of special tokens in a text ("<|im_end|>") become ids; "text": names stay text

    def batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, without BOS: int64 arrays (n,). Independent."""
        if self.special == "text":
            return self.tokenizer.encode_batch(texts)
        return [placed.ids for placed in self.placer(texts)]

    def pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Encode one text, which is given as consecutive pieces. A piece may end anywhere, also within a token. Yield arrays
        whose concatenation is the ids of the whole text, without BOS. Independent."""
        if self.special == "text":
            return self.tokenizer.encode_pieces(pieces)
        return encode_pieces(pieces, lambda text: self.placer([text])[0])

    def ids(self, text: str) -> np.ndarray:
        """Return the ids of a text of any length, without BOS: int64 (n,). Raises DataError if a character has no id, or if the
        text contains half of a surrogate pair. Independent."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # the tokenizers library would raise a TypeError that does not name the reason
            raise DataError(f"the text has half of a surrogate pair, or a byte that is not UTF-8 ({error})") from None
        return self.tokenizer.encode(text) if self.special == "text" else np.concatenate(list(self.pieces([text])))

    def begins(self, ids: np.ndarray) -> np.ndarray:
        """Return `ids`, with BOS in front if the training data has BOS and `ids` does not already begin with BOS. Pure."""
        return ids if self.table.bos is None or self._has_bos(ids) else np.insert(ids, 0, self.table.bos)

    def document(self, text: str) -> np.ndarray:
        """Return the ids of a text, preceded by BOS or, if the training data has no BOS, by the end-of-document id. Therefore
        the text's first token has a context. Independent."""
        ids = self.ids(text)
        return ids if self._has_bos(ids) else np.insert(ids, 0, self.begin)

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, with BOS in front if the training data has BOS. If the prompt is empty and there is no BOS,
        return the end-of-document id. Independent."""
        found: list[int] = self.begins(self.ids(text)).tolist()
        return found or [self.begin]

    def chat(self, text: str) -> list[int]:
        """Return the ids of a chat. `text`: the chat as the template has rendered it. No BOS is added, because the template
        writes BOS if the model needs it. If the text is empty, return BOS or the end-of-document id. Independent."""
        found: list[int] = self.ids(text).tolist()
        return found or [self.begin]

    @property
    def begin(self) -> int:
        """The id that precedes a document. If the training data has BOS, this is BOS. Otherwise, it is the end-of-document id."""
        return self.table.ends[0] if self.table.bos is None else self.table.bos

    def named(self, texts: Sequence[str]) -> tuple[str, int]:
        """Count the texts in which the name of a special token is encoded as plain text. Return (one of these names, number of
        texts), or ("", 0) if there are none. Pure."""
        names = self.names if self.special == "text" else None
        found = [match[0] for text in texts if names is not None and (match := names.search(text))]
        return (found[0], len(found)) if found else ("", 0)

    @cached_property
    def placer(self) -> Callable[[list[str]], list[Placed]]:
        """A function that encodes several texts. For each text it returns the ids, and for each id the range of characters that
        it encodes."""
        return placer(self.tokenizer, self.special)

    @cached_property
    def names(self) -> re.Pattern[str] | None:
        """A regular expression that matches the names of special tokens, or None if the tokenizer has no special tokens."""
        found = sorted(special_names(self.tokenizer), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, found))) if found else None

    def _has_bos(self, ids: np.ndarray) -> bool:
        return self.table.bos is not None and ids[:1].tolist() == [self.table.bos]

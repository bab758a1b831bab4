"""How prompts and evaluated texts become ids: as the training data's texts did (special_tokens.json). Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpidp.data.places import Placed, ids_of_pieces, placer
from mpidp.data.special_tokens import SpecialTokens, special_names
from mpidp.data.tokenizer import Tokenizer
from mpidp.errors import DataError


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer, and the special tokens that the training data has."""

    tokenizer: Tokenizer
    table: SpecialTokens
    special: str = "text"  # "tokens": names of special tokens in a text ("<|im_end|>") become their ids; "text": they stay text

    def ids(self, text: str) -> np.ndarray:
        """Return the ids of a text, without a token before it: (n,) int64. Raises DataError if a character has no id, or if half
        of a surrogate pair is missing."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # the tokenizers library would raise a TypeError that does not name the reason
            raise DataError(f"the text has half of a surrogate pair, or a byte that is not UTF-8 ({error})") from None
        if self.special == "text":
            return self.tokenizer.encode(text)
        return np.concatenate(list(ids_of_pieces([text], self._placer)))

    def document(self, text: str) -> np.ndarray:
        """Return the ids of a text after BOS or an end-of-document token, so that its first token has a context."""
        ids = self.ids(text)
        return ids if self._has_bos(ids) else np.insert(ids, 0, self.begin)

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, after BOS if the training data has it. An empty prompt is BOS or an end of document."""
        ids = self.ids(text)
        as_it_is = len(ids) > 0 and (self.table.bos is None or self._has_bos(ids))
        found: list[int] = (ids if as_it_is else np.insert(ids, 0, self.begin)).tolist()
        return found

    @property
    def begin(self) -> int:
        """The id before a document: BOS if the training data has it, else the end-of-document id."""
        return self.table.ends[0] if self.table.bos is None else self.table.bos

    def named(self, texts: Sequence[str]) -> tuple[str, int]:
        """Return the name of a special token that a text contains, and the number of such texts; ("", 0) if there is none."""
        found = [name for text in texts for name in self._names if name in text][:1]
        return (found[0], sum(any(name in text for name in self._names) for text in texts)) if found else ("", 0)

    def _has_bos(self, ids: np.ndarray) -> bool:
        return self.table.bos is not None and ids[:1].tolist() == [self.table.bos]

    @cached_property
    def _placer(self) -> Callable[[list[str]], list[Placed]]:
        return placer(self.tokenizer, self.special)

    @cached_property
    def _names(self) -> list[str]:
        return list(special_names(self.tokenizer))

"""Encode texts with a tokenizer, BOS and special tokens, and make the table of special tokens of the shards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from data_tools.options import PrepareOptions
from data_tools.vocabulary import given_tokenizer
from mpidp.data.chat_template import Template, TemplateRejection
from mpidp.data.places import Placed, ids_of_pieces, placer
from mpidp.data.special_tokens import SpecialTokens, special_names, special_tokens_of, with_template
from mpidp.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoder:
    """Encodes texts. The fields say how: the tokenizer, BOS, and what the names of special tokens become."""

    tokenizer: Tokenizer
    bos: int | None  # the id before every document and row; None: there is none
    special: str  # "tokens": the names of special tokens in the texts become their ids; "text": they stay text
    ends: tuple[int, ...] = ()  # ids that end a text or an assistant's turn

    def begins(self, ids: np.ndarray) -> np.ndarray:
        """Return the ids of a text with BOS in front, unless the text itself begins with it. Pure."""
        return ids if self.bos is None or ids[:1].tolist() == [self.bos] else np.insert(ids, 0, self.bos)

    def batch(self, texts: list[str]) -> list[np.ndarray]:
        """Encode several texts, without BOS. Independent."""
        if self.special == "text":
            return self.tokenizer.encode_batch(texts)
        return [placed.ids for placed in self.placer(texts)]

    def pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Encode a text that is given in pieces. Yield the ids of the whole text in parts, without BOS. The pieces may be cut
        anywhere. Independent."""
        if self.special == "text":
            return self.tokenizer.encode_pieces(pieces)
        return ids_of_pieces(pieces, self.placer)

    @cached_property
    def placer(self) -> Callable[[list[str]], list[Placed]]:
        """A function that encodes several texts, and returns which characters each token holds."""
        return placer(self.tokenizer, self.special)

    @cached_property
    def names(self) -> re.Pattern[str] | None:
        """A pattern of the names of special tokens; None if the tokenizer has none."""
        found = sorted(special_names(self.tokenizer), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, found))) if found else None


def table_of(tokenizer: str, eod: str | None) -> SpecialTokens:
    """Return the table of special tokens of --tokenizer. If the tokenizer will be made from the corpus, the table is empty.
    Independent."""
    given = given_tokenizer(tokenizer, eod)
    if given is None:
        return SpecialTokens(None, ())
    path = Path(tokenizer)
    return special_tokens_of(path if path.is_dir() else path.parent, given)


def completed_table(table: SpecialTokens, made: Tokenizer, template: Template | None, options: PrepareOptions) -> SpecialTokens:
    """Return the table of the shards: the tokenizer's table, changed by the chat template and the options. Pure."""
    if not table.ends:
        table = special_tokens_of(None, made)
    if template is not None:
        table = with_template(replace(table, template_args=template.args, tool_template=template.tool_text), made, template.text)
    has_bos = options.bos == "auto" and (template is None or _writes_bos(template, made, table.bos))
    return replace(table, bos=table.bos if has_bos else None, special=options.special or table.special)


def _writes_bos(template: Template, made: Tokenizer, bos: int | None) -> bool:
    """Return True if the template writes BOS at the start of a chat. In chats only the template adds BOS, as in
    transformers. Pure."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with suppress(TemplateRejection):
        return placer(made, "tokens")([template.render(messages)])[0].ids[:1].tolist() == [bos]
    return False

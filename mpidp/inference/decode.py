"""A trained model goes on from prompts, several at a time, each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpidp.data.tokenizer import Tokenizer
from mpidp.inference.loading import Loaded
from mpidp.inference.sampling import Sampling, seed_of
from mpidp.inference.speech import Speech


class Row:
    """One sequence that grows, and the window of it that the model sees."""

    def __init__(self, model: Any, ids: list[int], tokens: int, seed: int, hear: Callable[[int], bool]) -> None:
        """tokens: to add at most; hear: is told each one, and says whether it was the last."""
        self.ids, self.hear = list(ids), hear
        self.limit = len(ids) + tokens
        self.start = 0  # of the window
        self.ended = "tokens" if tokens == 0 else ""  # or eod, or stop: why
        self.generator = torch.Generator().manual_seed(seed)
        self._model, self._seq_len = model, model.shape.seq_len
        self.cache = model.new_cache(self.limit)

    def unseen(self) -> list[int]:
        """What the model must see now. A window beyond seq_len begins anew with its last half: the cache holds keys that are
        turned by their position, and none can move."""
        if len(self.ids) - self.start > self._seq_len:
            self.start = len(self.ids) - max(1, self._seq_len // 2)
            self.cache = self._model.new_cache(self.limit)
        return self.ids[self.start + (0 if self.cache is None else self.cache.length) :]

    def add(self, token: int, eod: int) -> None:
        """One more token; eod ends the sequence and is not part of it."""
        if token == eod:
            self.ended = "eod"
            return
        self.ids.append(token)
        if self.hear(token):
            self.ended = "stop"
        elif len(self.ids) == self.limit:
            self.ended = "tokens"


@torch.no_grad()
def decode(loaded: Loaded, rows: list[Row], sampling: Sampling, eod: int, vocab_size: int | None = None) -> None:
    """Let all rows grow to their ends. Rows that need one position go through the model together, longer beginnings alone: no row
    is padded. eod: that ends a row; -1 for none. vocab_size: of the tokenizer: a model whose vocabulary is padded has more
    ids, which mean nothing and are never drawn. Collective over loaded.grid.model."""
    while live := [row for row in rows if not row.ended]:
        unseen = {row: row.unseen() for row in live}
        together = [row for row in live if row.cache is not None and len(unseen[row]) == 1]
        alone = [[row] for row in live if row not in together]
        for group in ([together] if together else []) + alone:
            tokens = torch.tensor([unseen[row] for row in group])
            caches = None if group[0].cache is None else [row.cache for row in group]
            for row, logits in zip(group, loaded.last_logits(tokens, caches), strict=True):
                row.add(sampling.draw(logits[:vocab_size], row.generator), eod)


@dataclass(frozen=True)
class Continuation:
    """What was added to a prompt."""

    text: str
    tokens: int
    ended: str  # tokens, eod or stop: why
    cut: bool  # it grew beyond what the model sees


def go_on(
    loaded: Loaded, tokenizer: Tokenizer, prompts: dict[int, list[int]], sampling: Sampling, tokens: int, seed: int,
    stops: Sequence[str] = (), say: Callable[[str], None] | None = None,
) -> list[tuple[int, Continuation]]:
    """(number, continuation) of prompts, ids by their number in the file, computed together. say: is given what is added to
    prompt 0, piece by piece. Collective over loaded.grid.model."""
    speeches = {i: Speech(tokenizer.decode, ids, stops, say if i == 0 else None) for i, ids in prompts.items()}
    rows = {i: Row(loaded.model, ids, tokens, seed_of(seed, i), speeches[i].add) for i, ids in prompts.items()}
    decode(loaded, list(rows.values()), sampling, tokenizer.eod, tokenizer.vocab_size)
    return [(i, Continuation(speech.end(), len(speech.ids), rows[i].ended, rows[i].start > 0)) for i, speech in speeches.items()]

"""Generates text from several prompts in one batch. With exact=True, a text does not depend on the other prompts of its batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpidp.data.encoder import Encoder
from mpidp.inference.detokenize import detokenizer_of
from mpidp.inference.loading import Loaded
from mpidp.inference.sampling import Sampling, seed_of
from mpidp.inference.speech import StreamedText
from mpidp.model.joint_cache import is_exact, join


class DecodedText:
    """The ids of a prompt and of the text that is generated after it. The input of the model is the last part of these ids,
    which is called the window."""

    def __init__(self, model: Any, ids: list[int], tokens: int, seed: int, on_token: Callable[[int], bool]) -> None:
        """ids: the token ids of the prompt. tokens: maximum number of new tokens. seed: the seed of the random generator.
        on_token: a function that gets each new token. Generation stops if it returns True."""
        self.ids, self.on_token = list(ids), on_token
        self.limit = len(ids) + tokens
        self.start = 0  # index of the first id in the window
        self.ended = "tokens" if tokens == 0 else ""  # why generation ended: tokens, eod or stop; "" while it continues
        self.generator = torch.Generator().manual_seed(seed)
        self._model, self._seq_len = model, model.shape.seq_len
        self.cache = model.new_cache(self.limit)

    def unseen(self) -> list[int]:
        """Return the ids that the model gets next: those of the window that are not in the cache.

        If the window is longer than seq_len, it is cut to its last seq_len / 2 tokens. The cache is then replaced by an empty
        one, because cached keys depend on their position in the window.
        """
        if len(self.ids) - self.start > self._seq_len:
            self.start = len(self.ids) - max(1, self._seq_len // 2)
            self.cache = self._model.new_cache(self.limit)
        return self.ids[self.start + (0 if self.cache is None else self.cache.length) :]

    def add(self, token: int, ends: Collection[int]) -> None:
        """Append `token`. If it is one of `ends`, do not append it, and end the sequence."""
        if token in ends:
            self.ended = "eod"
            return
        self.ids.append(token)
        if self.on_token(token):
            self.ended = "stop"
        elif len(self.ids) == self.limit:
            self.ended = "tokens"


@torch.no_grad()
def decode(
    loaded: Loaded, rows: list[DecodedText], sampling: Sampling, ends: Collection[int] = (), vocab_size: int | None = None,
    exact: bool = True,
) -> None:
    """Generate tokens until all sequences in `rows` have ended. Collective over loaded.grid.model.

    ends: the ids that end a sequence. vocab_size: number of tokens of the tokenizer. Ids from `vocab_size` on are never drawn.
    exact: if True, only sequences with one new position form a batch, and longer inputs run alone. After by_rows()
    (rowwise.py), a sequence on the CPU then gets the same bits in every batch. If False, all inputs of equal length form a
    batch. Raises DataError if a logit is nan or +inf, or if all logits are -inf.
    """
    while live := [row for row in rows if not row.ended]:
        unseen = {row: row.unseen() for row in live}
        groups: dict[tuple[int, int], list[DecodedText]] = {}
        for number, row in enumerate(live):
            size = len(unseen[row])
            together = not exact or (row.cache is not None and size == 1)
            groups.setdefault((size, 0 if together else 1 + number), []).append(row)
        for (size, _), group in groups.items():
            tokens = torch.tensor([unseen[row] for row in group])
            caches = None if group[0].cache is None else [row.cache for row in group]
            if caches is not None and size == 1 and (not exact or is_exact(loaded.device)):
                join(caches)
            for row, logits in zip(group, loaded.last_logits(tokens, caches), strict=True):
                logits = logits[:vocab_size]
                if not math.isfinite(float(logits.max())):  # the maximum of values with nan is nan
                    raise loaded.diverged("largest logit")
                row.add(sampling.draw(logits, row.generator), ends)


@dataclass(frozen=True)
class Continuation:
    """The text generated for a prompt."""

    text: str
    tokens: int  # number of generated tokens
    ended: str  # why generation ended: tokens, eod or stop
    cut: bool  # whether prompt and text exceeded the model's context


def continue_prompts(
    loaded: Loaded, encoder: Encoder, prompts: dict[int, list[int]], sampling: Sampling, tokens: int, seed: int,
    stops: Sequence[str] = (), write: Callable[[str], None] | None = None, interrupted: Callable[[], bool] = lambda: False,
    exact: bool = True,
) -> list[tuple[int, Continuation]]:
    """Generate a text for each prompt, as one batch. Return (number of the prompt, Continuation) pairs.

    prompts: maps the number of a prompt to its token ids. seed: the seed from which seed_of() derives each prompt's seed. stops:
    strings that end a text. write: a function that gets each new piece of the text of prompt 0. interrupted: a function that is
    called after each token, and ends the text if it returns True. All ranks of a replica must get the same result from
    `interrupted`. exact: see decode(). Collective over loaded.grid.model.
    """
    streams = {
        i: StreamedText(detokenizer_of(encoder.tokenizer, ids), stops, write if i == 0 else None) for i, ids in prompts.items()
    }

    def stops_at(stream: StreamedText) -> Callable[[int], bool]:
        return lambda token: stream.add(token) | interrupted()

    rows = {i: DecodedText(loaded.model, ids, tokens, seed_of(seed, i), stops_at(streams[i])) for i, ids in prompts.items()}
    decode(loaded, list(rows.values()), sampling, encoder.table.ends, encoder.tokenizer.vocab_size, exact)
    return [(i, Continuation(stream.end(), len(stream.ids), rows[i].ended, rows[i].start > 0)) for i, stream in streams.items()]

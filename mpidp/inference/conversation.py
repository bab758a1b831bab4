"""Keeps the messages of a chat of several turns, and makes prompts that fit into the model's context."""

from __future__ import annotations

from dataclasses import dataclass

from mpidp.data.chat_template import Template
from mpidp.data.encoder import Encoder
from mpidp.errors import DataError
from mpidp.inference.chats import rendered

ANSWER_SHARE = 4  # a quarter of the context is kept free for the answer, if the answer may be that long


@dataclass(frozen=True)
class Turn:
    """A prompt for the model. ids: the token ids of the chat so far. tokens: maximum number of tokens of the answer. left_out:
    the number of old messages that were deleted so that the prompt fits into the context."""

    ids: list[int]
    tokens: int
    left_out: int


class Conversation:
    """The messages of a chat. Independent."""

    def __init__(self, template: Template, encoder: Encoder, seq_len: int, tokens: int, system: str | None = None) -> None:
        """seq_len: length of the context. tokens: maximum number of tokens of an answer. system: the system message, or None for
        no such message."""
        self._template, self._encoder, self._seq_len, self._tokens = template, encoder, seq_len, tokens
        self._begin = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Delete all messages except the system message."""
        self._turns.clear()

    def ask(self, text: str) -> Turn:
        """Add the user's message `text`. Return the prompt for the model.

        If the chat does not fit into the context, its oldest turns are deleted. Raises DataError if the message alone does not
        fit, or if the template rejects the chat. The message is then not added.
        """
        turns = [*self._turns, {"role": "user", "content": text}]
        room = min(self._tokens, max(1, self._seq_len // ANSWER_SHARE))
        while True:
            ids = self._encoder.chat(rendered(self._template, {"messages": self._begin + turns}))
            if len(ids) + room <= self._seq_len:
                break
            if len(turns) == 1:
                raise DataError(f"the message is too long: with it, the chat has {len(ids)} tokens. The context has "
                                f"{self._seq_len} tokens, of which {room} are for the answer. Shorten the message")
            turns = turns[2:]  # the oldest message of the user and its answer
        left_out, self._turns = len(self._turns) + 1 - len(turns), turns
        return Turn(ids, min(self._tokens, self._seq_len - len(ids)), left_out)

    def answered(self, text: str) -> None:
        """Add `text` as the model's answer."""
        self._turns.append({"role": "assistant", "content": text})

"""Questions with several answers, of which the likeliest is the model's: how they are read, encoded and counted. Pure.

As in lm-evaluation-harness: the model chooses the answer with the highest log-likelihood after the context. `accuracy` takes the
plain sum, `accuracy_norm` divides by the answer's bytes of UTF-8 (the harness's acc_norm, which divides by characters: the same
for ASCII), `accuracy_token` by its tokens. Of equals the first wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpidp.data.tokenizer import Tokenizer
from mpidp.errors import DataError
from mpidp.inference.rows import read_rows

EXAMPLE = '{"context": "2 + 2 =", "choices": [" 4", " 5"], "label": 0}'


@dataclass(frozen=True)
class Item:
    """A question. line: where it stands in its file."""

    line: int
    context: str
    choices: list[str]
    label: int


@dataclass(frozen=True)
class Scored:
    """A context and one answer as ids, of which the last `counted` are the answer."""

    ids: list[int]
    counted: int
    cut: bool  # the context's beginning is left out


def read_choices(path: str | Path) -> list[Item]:
    """Of a .jsonl. label: an index from 0, or the right choice's text. DataError names the line. Independent."""
    found = []
    for number, row in read_rows(path, EXAMPLE):
        problem = _problem(row)
        if problem:
            raise DataError(f"{path}, line {number}: {problem}; each line is like {EXAMPLE}")
        label = row["label"]
        found.append(Item(number, row["context"], row["choices"], label if type(label) is int else row["choices"].index(label)))
    return found


def _problem(row: dict[str, Any]) -> str:
    context, choices, label = row.get("context"), row.get("choices"), row.get("label")
    if not isinstance(context, str):
        return '"context" must be a text'
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        return '"choices" must be a list of at least two texts'
    if "" in choices:
        return f"choice {choices.index('')} is empty, and an empty text is never unlikely"
    if len(set(choices)) < len(choices):
        return "two choices are the same"
    if type(label) is int:
        return "" if 0 <= label < len(choices) else f'"label" {label} is outside 0..{len(choices) - 1}'
    if not isinstance(label, str):
        return '"label" must be an index, or the text of a choice'
    return "" if label in choices else f'"label" {label!r} is none of the choices'


def encode(tokenizer: Tokenizer, item: Item, seq_len: int, path: str | Path = "choices") -> list[Scored]:
    """Each choice after its context, as a document of its own: it begins after an end of document, or BOS. They are encoded as
    one text, since that is how it would stand in a corpus; the choice's are the tokens that the context alone does not have.
    Contexts that do not fit lose their beginning. DataError for a choice that does not fit. Independent."""
    found = []
    try:
        context = tokenizer.encode(item.context.rstrip()).tolist()  # spaces before a choice belong to its first token
        for place, choice in enumerate(item.choices):
            ids = tokenizer.encode(item.context + choice).tolist()
            counted = len(ids) - _common(context, ids)
            if not 0 < counted <= seq_len:
                raise DataError(f"choice {place} has {counted} tokens, and the model sees {seq_len} (model.seq_len)")
            whole = [tokenizer.begin, *ids]
            found.append(Scored(whole[-(seq_len + 1) :], counted, len(whole) > seq_len + 1))
    except (DataError, UnicodeEncodeError) as error:  # the latter: half a surrogate pair
        raise DataError(f"{path}, line {item.line}: {error}") from None
    return found


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def counted(items: Sequence[Item], encoded: Sequence[Sequence[Scored]], scores: np.ndarray) -> dict[str, Any]:
    """What the shares of right answers are. scores: (items, most choices), log-likelihoods in nats. Pure."""
    right = dict.fromkeys(("accuracy", "accuracy_norm", "accuracy_token"), 0)
    for item, rows, row in zip(items, encoded, scores, strict=True):
        plain = row[: len(item.choices)]
        by = {
            "accuracy": plain,
            "accuracy_norm": plain / [len(choice.encode()) for choice in item.choices],
            "accuracy_token": plain / [one.counted for one in rows],
        }
        for name, of_choices in by.items():
            right[name] += int(np.argmax(of_choices)) == item.label
    return {name: n / len(items) for name, n in right.items()} | {
        "items": len(items),
        "chance": sum(1 / len(item.choices) for item in items) / len(items),
        "cut_items": sum(any(one.cut for one in rows) for rows in encoded),
    }

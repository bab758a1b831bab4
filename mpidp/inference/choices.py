"""Reads and encodes multiple-choice questions, and computes accuracies. Pure.

The model's answer is the choice with the highest score. If several choices have this score, the answer is the first of them.
For `accuracy`, the score is the log-likelihood of the choice after the context (acc in lm-evaluation-harness). For
`accuracy_norm`, it is the log-likelihood divided by the number of characters of the choice, without one leading space
(acc_norm in the harness). For `accuracy_token`, it is the log-likelihood divided by the number of tokens of the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpidp.data.encoder import Encoder
from mpidp.errors import DataError
from mpidp.inference.rows import read_rows

EXAMPLE = '{"context": "2 + 2 =", "choices": [" 4", " 5"], "label": 0}'


@dataclass(frozen=True)
class Question:
    """A multiple-choice question. line: the number of the line, item or row in the file. label: the index of the right choice."""

    line: int
    context: str
    choices: list[str]
    label: int
    unit: str = "line"  # what `line` counts: line, item or row


@dataclass(frozen=True)
class EncodedChoice:
    """The token ids of a context, followed by those of one choice. counted: the number of ids of the choice."""

    ids: list[int]
    counted: int
    cut: bool  # whether the context was truncated on the left


def read_choices(path: str | Path) -> list[Question]:
    """Return the questions in a file of rows (.jsonl, .json, ...). In the file, a label is the right choice's text, or its index
    from 0.

    Raises DataError if a question is invalid. The message names the line. Independent.
    """
    found = []
    for one in read_rows(path, EXAMPLE):
        row = one.fields or {}
        problem = _problem(row)
        if problem:
            raise DataError(f"{path}, {one.unit} {one.number}: {problem}. Each {one.unit} must be an object like {EXAMPLE}")
        label = row["label"]
        place = label if type(label) is int else row["choices"].index(label)
        found.append(Question(one.number, row["context"], row["choices"], place, one.unit))
    return found


def _problem(row: dict[str, Any]) -> str:
    context, choices, label = row.get("context"), row.get("choices"), row.get("label")
    if not isinstance(context, str):
        return '"context" must be a string'
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        return '"choices" must be a list of at least two strings'
    if "" in choices:
        return f"choice {choices.index('')} is empty and cannot be scored"
    if len(set(choices)) < len(choices):
        return "two choices are equal"
    if type(label) is int:
        return "" if 0 <= label < len(choices) else f'"label" {label} is not in 0..{len(choices) - 1}'
    if not isinstance(label, str):
        return '"label" must be an index or the text of a choice'
    return "" if label in choices else f'"label" {label!r} is not one of the choices'


def encode(encoder: Encoder, item: Question, seq_len: int, path: str | Path = "choices") -> list[EncodedChoice]:
    """Return the choices of a question as token ids. Each choice and its context form one document, which starts with BOS or an
    end-of-document token.

    Context and choice are encoded together, and then the context alone. The choice's tokens are the tokens of the first result
    after the common beginning of the two results. If a context is too long, its first tokens are left out. path: the file. Errors
    name it. Raises DataError if a choice has no tokens, or more than `seq_len` tokens. Independent.
    """
    found = []
    try:
        context = encoder.document(item.context.rstrip()).tolist()  # a space before the choice is part of its first token
        for place, choice in enumerate(item.choices):
            whole = encoder.document(item.context + choice).tolist()
            counted = len(whole) - _common(context, whole)
            if not 0 < counted <= seq_len:
                raise DataError(f"choice {place} has {counted} tokens, but must have 1 to {seq_len} (model.seq_len)")
            found.append(EncodedChoice(whole[-(seq_len + 1) :], counted, len(whole) > seq_len + 1))
    except DataError as error:
        raise DataError(f"{path}, {item.unit} {item.line}: {error}") from None
    return found


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def accuracies(items: Sequence[Question], encoded: Sequence[Sequence[EncodedChoice]], scores: np.ndarray) -> dict[str, Any]:
    """Return a dict with the values accuracy, accuracy_norm and accuracy_token (see the beginning of this file), items (number
    of questions), chance (expected accuracy of random answers) and cut_items (number of questions with a truncated context).
    items: the questions. encoded: the encoded choices of each question. scores: the log-likelihoods in nats, (questions,
    largest number of choices). Pure."""
    right = dict.fromkeys(("accuracy", "accuracy_norm", "accuracy_token"), 0)
    for item, rows, row in zip(items, encoded, scores, strict=True):
        plain = row[: len(item.choices)]
        by = {
            "accuracy": plain,
            "accuracy_norm": plain / [max(1, len(choice.removeprefix(" "))) for choice in item.choices],
            "accuracy_token": plain / [one.counted for one in rows],
        }
        for name, of_choices in by.items():
            right[name] += int(np.argmax(of_choices)) == item.label
    return {name: n / len(items) for name, n in right.items()} | {
        "items": len(items),
        "chance": sum(1 / len(item.choices) for item in items) / len(items),
        "cut_items": sum(any(one.cut for one in rows) for rows in encoded),
    }

"""Laws of multiple choice and of the loss of a text: an answer's likelihood is that of its tokens, and each token counts once."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpidp.data.encoder import Encoder
from mpidp.data.special_tokens import SpecialTokens
from mpidp.data.tokenizer import ByteTokenizer, train_bpe
from mpidp.errors import DataError
from mpidp.inference.choices import Question, accuracies, encode, read_choices
from mpidp.inference.scoring import log_likelihoods, row_losses, text_loss, windows
from tests.unit.test_generate import ids, loaded

PLAIN = Encoder(ByteTokenizer(), SpecialTokens(None, (256,)))
ROW: dict[str, Any] = {"context": "2 + 2 =", "choices": [" 4", " five", " 22"], "label": 0}


def item(**changes: Any) -> Question:
    return Question(**({"line": 1} | ROW | changes))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_label_is_a_place_or_a_text(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"label": " 22"}, ROW | {"choices": ["1", "0"], "label": "0"}, ROW | {"more": [1]}]
    assert [one.label for one in read_choices(write(tmp_path / "c.jsonl", *rows))] == [0, 2, 1, 0]


@pytest.mark.parametrize(("changes", "said"), [
    ({"context": 3}, '"context" must be a string'), ({"choices": []}, "two strings"), ({"choices": ["a"]}, "at least two"),
    ({"choices": "ab"}, "must be a list"), ({"choices": ["a", 3]}, "two strings"), ({"choices": ["a", ""]}, "choice 1 is empty"),
    ({"choices": ["a", "a"]}, "two choices are equal"), ({"label": 3}, r'"label" 3 is not in 0\.\.2'),
    ({"label": -1}, "is not in"), ({"label": True}, '"label" must be an index'), ({"label": None}, '"label" must be an index'),
    ({"label": 1.0}, "must be an index"), ({"label": "4"}, "'4' is not one of the choices"),
])
def test_bad_questions_are_named_by_their_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"c.jsonl, line 2: .*{said}.*Each line must be an object like"):
        read_choices(write(tmp_path / "c.jsonl", ROW, ROW | changes))


def test_missing_fields_are_named(tmp_path: Path) -> None:
    for field in ROW:
        with pytest.raises(DataError, match=f'line 1: "{field}" must be'):
            read_choices(write(tmp_path / "c.jsonl", {key: value for key, value in ROW.items() if key != field}))


def test_only_the_choice_is_counted() -> None:
    one = encode(PLAIN, item(context="ab", choices=["cde", " x"]), 24)
    assert [(row.ids, row.counted, row.cut) for row in one] == [
        ([256, *b"abcde"], 3, False), ([256, *b"ab x"], 2, False),
    ]
    spaced = encode(PLAIN, item(context="ab ", choices=["cde", "x"]), 24)  # the space belongs to the choice
    assert [(row.ids, row.counted) for row in spaced] == [([256, *b"ab cde"], 4), ([256, *b"ab x"], 2)]
    assert [row.counted for row in encode(PLAIN, item(context="", choices=["cde", "x"]), 24)] == [3, 1]


def test_tokens_that_span_the_border_are_the_choices() -> None:
    tokenizer = train_bpe(iter(["abcd abcd abcd"] * 50), 300)
    encoder = Encoder(tokenizer, SpecialTokens(None, (0,)))
    context, (row, _) = tokenizer.encode("ab"), encode(encoder, item(context="ab", choices=["cd", "x"]), 24)
    assert len(context) >= 1 and row.ids == [tokenizer.eod, *tokenizer.encode("abcd")] and row.counted == len(row.ids) - 1 == 1


def test_a_context_loses_its_beginning_a_choice_nothing() -> None:
    long, short = encode(PLAIN, item(context="x" * 30, choices=["abc", "d" * 24]), 24)
    assert len(long.ids) == len(short.ids) == 25 and (long.counted, short.counted) == (3, 24) and long.cut and short.cut
    with pytest.raises(DataError, match=r"c.jsonl, line 1: choice 1 has 25 tokens, but must have 1 to 24"):
        encode(PLAIN, item(context="x", choices=["abc", "d" * 25]), 24, "c.jsonl")
    with pytest.raises(DataError, match="line 1: .*surrogates"):
        encode(PLAIN, item(context="\ud800"), 24)


def plain(model: Any, context: Sequence[int], choice: Sequence[int]) -> float:
    """Compute log p(choice | context) token by token."""
    total = 0.0
    for i, token in enumerate(choice):
        window = torch.tensor([[*context, *choice[:i]]])
        total += float(F.log_softmax(model(window)[0, -1].double(), dim=-1)[token])
    return total


@torch.no_grad()
def test_likelihoods_are_those_of_a_plain_computation() -> None:
    model = loaded()
    questions = [item(), item(context="a", choices=["b", " a long one"], label=1), item(context="", choices=["xy", "z"])]
    encoded = [encode(PLAIN, one, 24) for one in questions]
    found = log_likelihoods(model, encoded)
    for i, one in enumerate(questions):
        for j, choice in enumerate(one.choices):
            wanted = plain(model.model, [256, *one.context.encode()], list(choice.encode()))
            assert found[i, j] == pytest.approx(wanted, abs=1e-4)
    assert found.shape == (3, 3)


def test_accuracies_divide_by_what_they_say() -> None:
    one = item(choices=[" 4", " five", "é"], label=1)
    tokens = [row.counted for row in encode(PLAIN, one, 24)]
    assert tokens == [2, 5, 2]
    for label, scores, right in [  # characters without the leading space: 1, 4, 1
        (0, [-4.0, -5.0, -9.0], (1, 0, 0)), (1, [-4.0, -5.0, -9.0], (0, 1, 1)), (0, [-4.0, -17.0, -9.0], (1, 1, 1)),
        (1, [-4.0, -9.0, -9.0], (0, 1, 1)),  # the context does not count
    ]:
        found = accuracies([item(choices=one.choices, label=label)], [encode(PLAIN, one, 24)], np.array([scores]))
        assert (found["accuracy"], found["accuracy_norm"], found["accuracy_token"]) == right
    tokenizer = train_bpe(iter(["hello hello hello"] * 50), 300)
    asked = item(context="x", choices=["hello", "ab"], label=0)  # 5 characters and 1 token; 2 characters and 2 tokens
    found = accuracies([asked], [encode(Encoder(tokenizer, SpecialTokens(None, (0,))), asked, 24)], np.array([[-3.0, -2.0]]))
    assert (found["accuracy"], found["accuracy_norm"], found["accuracy_token"]) == (0, 1, 0)
    assert found["chance"] == 0.5 and found["items"] == 1 and found["cut_items"] == 0


def test_accuracies_are_those_of_the_harness() -> None:
    """300 questions. lm_eval's formula: choices are written without the delimiter " ", by which acc_norm does not divide."""
    generator, words = np.random.default_rng(0), ["a", "bb", "ccc dd", "é", "日本語", "not", " b", "eeeeeeeeee"]
    items, scores, acc, acc_norm = [], [], [], []
    for _ in range(300):
        choices = generator.choice(words, size=3, replace=False).tolist()
        label, lls = int(generator.integers(3)), (-generator.random(3) * 10).astype(np.float64)
        completion_len = np.array([float(len(choice)) for choice in choices])
        acc.append(1.0 if np.argmax(lls) == label else 0.0)
        acc_norm.append(1.0 if np.argmax(lls / completion_len) == label else 0.0)
        items.append(item(choices=[" " + choice for choice in choices], label=label))
        scores.append(lls)
    found = accuracies(items, [encode(PLAIN, one, 40) for one in items], np.array(scores))
    assert (found["accuracy"], found["accuracy_norm"]) == (np.mean(acc), np.mean(acc_norm))


def test_the_space_before_a_choice_is_not_one_of_its_characters() -> None:
    asked = [item(choices=[" a", " bbbb"], label=1), item(context="if not", choices=[" True", " a"], label=0)]
    encoded = [encode(PLAIN, one, 24) for one in asked]
    assert accuracies(asked, encoded, np.array([[-2.0, -5.2], [-7.57, -2.97]]))["accuracy_norm"] == 1.0
    spaces = item(choices=[" ", "b"], label=0)
    assert accuracies([spaces], [encode(PLAIN, spaces, 24)], np.array([[-2.0, -3.0]]))["accuracy_norm"] == 1.0


@torch.no_grad()
def test_a_model_of_nan_has_no_accuracy_and_no_loss() -> None:
    model = loaded()
    model.model.head.weight[7, 0] = math.nan
    with pytest.raises(DataError, match="the model: the log-likelihood of a choice is not finite"):
        log_likelihoods(model, [encode(PLAIN, item(), 24)])
    with pytest.raises(DataError, match="the model: the loss is not finite"):
        text_loss(model, np.array([256, *ids(30)]), 24, 12, 2)


def test_of_equals_the_first_wins_and_padding_never_does() -> None:
    asked = [item(label=0), item(choices=["a", "b"], label=0)]
    encoded = [encode(PLAIN, one, 24) for one in asked]
    assert accuracies(asked, encoded, np.array([[-1.0, -9.0, -9.0], [-2.0, -2.0, 0.0]]))["accuracy"] == 1.0


@pytest.mark.parametrize(("targets", "seq_len", "stride"), [(1, 8, 4), (8, 8, 4), (9, 8, 4), (50, 8, 1), (50, 8, 8), (23, 8, 3)])
def test_every_target_counts_once_and_sees_enough(targets: int, seq_len: int, stride: int) -> None:
    cut, scored = windows(targets, seq_len, stride), []
    for begin, first, end in cut:
        assert 0 <= begin <= first < end <= targets and end - begin <= seq_len
        scored += range(first, end)
        assert begin == 0 or (end - begin == seq_len and first - begin >= seq_len - stride)
    assert scored == list(range(targets))


@torch.no_grad()
@pytest.mark.parametrize(("stride", "together"), [(12, 3), (5, 1), (24, 4), (1, 16)])
def test_the_loss_of_a_text_is_that_of_its_tokens_in_their_windows(stride: int, together: int) -> None:
    model, text = loaded(), np.array([256, *ids(70)])
    wanted = 0.0
    for begin, first, end in windows(70, 24, stride):
        log_p = F.log_softmax(model.model(torch.tensor(text[begin:end])[None])[0].double(), dim=-1)
        wanted -= sum(float(log_p[place - begin, text[place + 1]]) for place in range(first, end))
    assert text_loss(model, text, 24, stride, together) == pytest.approx(wanted, rel=1e-6)


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    rows = [(ids(n, n), n // 2) for n in (3, 20, 8)]
    found, model = row_losses(loaded(), rows), loaded()
    for row, loss in zip(rows, found, strict=True):
        assert loss == pytest.approx(row_losses(model, [row])[0], rel=1e-5) and math.isfinite(loss)

"""Laws of tiktoken as the encoder: the ids are those of the `tokenizers` library, or tiktoken is not used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools.prepare import prepare
from mpidp.data import batch_encoder, fast_bpe
from mpidp.data.fast_bpe import PATTERNS, FastBPE, NotEqual
from mpidp.data.tokenizer import tokenizer_from_json
from tests.tiny import text as corpus

pytest.importorskip("tiktoken")
WORDS = "naïve 日本語 don't they'll 1234567 x=f(y)\n\n\tI'M ЖУК  a\u0301 \u3000 ſ’s e.g.\r\n٣٤ <|endoftext|>"
ALPHABET = "".join(sorted(set(WORDS))) + "abcdefghij 0123456789\n\n  '"


def library(pattern: str = "", **model: Any) -> Tokenizer:
    """A byte-level BPE tokenizer. pattern: of a Split before it; "": that of GPT-2."""
    made = Tokenizer(models.BPE(**model))
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if "vocab" not in model:
        made.train_from_iterator([corpus(3000), WORDS * 9], trainers.BpeTrainer(
            vocab_size=700, special_tokens=["<|endoftext|>"], show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    made.encode_special_tokens = True
    return made


def fast(made: Tokenizer) -> FastBPE:
    return FastBPE(made.to_str(), made)


PAIRS = [(made, fast(made)) for made in map(library, ("", *PATTERNS))]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet=ALPHABET, max_size=60) | st.text(max_size=20), min_size=1, max_size=4))
def test_the_ids_are_those_of_the_library(texts: list[str]) -> None:
    for made, ours in PAIRS:
        wanted = [encoding.ids for encoding in made.encode_batch(texts, add_special_tokens=False)]
        assert [ids.tolist() for ids in ours.encode_batch(texts)] == wanted


def test_the_places_are_the_characters_of_each_token() -> None:
    for made, ours in PAIRS:
        placed, encoding = ours.placed(WORDS), made.encode(WORDS, add_special_tokens=False)
        assert placed.ids.tolist() == encoding.ids
        assert list(zip(placed.starts.tolist(), placed.stops.tolist(), strict=True)) == encoding.offsets


def vocabulary(*merges: tuple[str, str]) -> dict[str, Any]:
    names = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)])
    return {"vocab": {name: i for i, name in enumerate(names)}, "merges": list(merges)}


def test_a_token_that_other_merges_reach_is_rejected() -> None:
    """tiktoken joins a and bc to the token abc, but the list has only ab and c."""
    made = library(**vocabulary(("b", "c"), ("a", "b"), ("ab", "c")))
    assert made.encode("abc").tokens == ["a", "bc"]
    with pytest.raises(NotEqual, match="forms the token b'abc' from another pair"):
        fast(made)
    fast(library(**vocabulary(("a", "b"), ("b", "c"), ("ab", "c"))))


@pytest.mark.parametrize(("change", "reason"), [
    (lambda js: js["added_tokens"].append(js["added_tokens"][0] | {"content": "two", "special": False}), "added_tokens"),
    (lambda js: js["model"].update(dropout=0.1), "plain byte-level BPE"),
    (lambda js: js["model"].update(unknown=1), "plain byte-level BPE"),
    (lambda js: js.update(normalizer={"type": "NFC"}), "plain byte-level BPE"),
    (lambda js: js["pre_tokenizer"].update(add_prefix_space=True), "pre-tokenizer"),
    (lambda js: js["pre_tokenizer"].update(use_regex=False), "pre-tokenizer"),
    (lambda js: js["model"]["vocab"].update(zebra=9999), "neither bytes nor results"),
    (lambda js: js["model"]["vocab"].pop("!"), "neither bytes nor results"),
    (lambda js: js["model"]["merges"].append(["日", "本"]), "not a token of byte-level BPE"),
])
def test_another_tokenizer_is_rejected(change: Any, reason: str) -> None:
    parsed = json.loads(PAIRS[0][0].to_str())
    change(parsed)
    with pytest.raises(NotEqual, match=reason):
        FastBPE(json.dumps(parsed), PAIRS[0][0])


def test_a_special_token_that_is_a_word_is_rejected_with_ignore_merges() -> None:
    for ignores in (False, True):
        made = library(ignore_merges=ignores)
        made.train_from_iterator([corpus(3000)], trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<|endoftext|>", "pad"], show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
        assert (made.encode("pad", add_special_tokens=False).ids == [made.token_to_id("pad")]) is ignores
        if ignores:
            with pytest.raises(NotEqual, match="word of the text as the special token 'pad'"):
                fast(made)
        else:
            assert fast(made).encode_batch(["a pad pad"])[0].tolist() == made.encode("a pad pad", add_special_tokens=False).ids


def test_a_million_spaces_are_encoded() -> None:
    text = "x" + " " * 1_050_000 + "y"
    made, ours = PAIRS[0]
    placed = ours.placed(text)
    assert placed.ids.tolist() == made.encode(text, add_special_tokens=False).ids
    assert placed.stops[-1] == len(text)


def test_a_character_of_another_class_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with another version of Unicode: the pattern of tiktoken does not take 日 for a letter."""
    monkeypatch.setattr(fast_bpe, "GPT2", fast_bpe.GPT2.replace(r" ?\p{L}+", r" ?(?:(?!日)\p{L})+|日"))
    ours = fast(PAIRS[0][0])
    ours.encode_batch(["plain naïve"])
    with pytest.raises(NotEqual, match="splits text into different words at a character"):
        ours.encode_batch(["a日b"])


def test_prepare_writes_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiktoken from the first text on, with tiktoken given up on the way, and without it. Long texts are in windows."""
    rows = [{"text": corpus(2000 + 37 * i) + WORDS} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tokenizer.json").write_text(PAIRS[0][0].to_str())
    found = {}
    for name in ("library", "tiktoken", "given up"):
        with monkeypatch.context() as patch:
            patch.setattr(batch_encoder, "CHARACTERS_PER_TOKEN", 0)
            patch.setattr(batch_encoder, "CHARACTERS", 10**9 if name == "library" else 1)
            patch.setattr("data_tools.encode.BATCH_CHARACTERS", 5000)
            patch.setattr("data_tools.encode.WINDOW", 3000)
            patch.setattr("mpidp.data.long_text.WINDOW", 1500)
            patch.setattr("mpidp.data.long_text.OVERLAP", 300)
            if name == "given up":
                patch.setattr(FastBPE, "_encode", StopsAfter(9))
            index = prepare(str(tmp_path / "rows.jsonl"), str(tmp_path / "tokenizer.json"), tmp_path / name, verbose=False)
            found[name] = [file.sha256 for file in index.files]
    assert found["library"] == found["tiktoken"] == found["given up"]


class StopsAfter:
    """FastBPE._encode for this many texts; then it raises NotEqual."""

    def __init__(self, calls: int) -> None:
        self.calls, self.own = calls, FastBPE._encode

    def __get__(self, encoder: FastBPE, owner: type) -> Callable[[str], np.ndarray]:
        return lambda text: self(encoder, text)

    def __call__(self, encoder: FastBPE, text: str) -> np.ndarray:
        self.calls -= 1
        if self.calls < 0:
            raise NotEqual("a test")
        return self.own(encoder, text)


def test_several_merges_to_one_token() -> None:
    """As in tokenizers that transformers converts from tiktoken: each way to cut a token in two tokens is a merge."""
    made, text = library(**vocabulary(("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc"))), "abcab bcabcc"
    assert fast(made).encode_batch([text])[0].tolist() == made.encode(text).ids
    assert made.encode("abc").tokens == ["abc"]
    with pytest.raises(NotEqual, match="do not follow each other"):
        fast(library(**vocabulary(("b", "c"), ("a", "b"), ("ab", "c"), ("c", "c"), ("a", "bc"))))


def test_the_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_encoder, "CHARACTERS_PER_TOKEN", 0)
    made = tokenizer_from_json(PAIRS[0][0].to_str())
    assert made.program == ""
    made.encode_batch(["a" * batch_encoder.CHARACTERS])
    assert made.program == "tiktoken"
    parsed = json.loads(PAIRS[0][0].to_str()) | {"normalizer": {"type": "NFC"}}
    other = tokenizer_from_json(json.dumps(parsed))
    other.encode_batch(["a" * batch_encoder.CHARACTERS])
    assert other.program == "the tokenizers library (the tokenizer is not plain byte-level BPE)"

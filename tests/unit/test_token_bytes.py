"""Laws of the bytes of tokens: they add up to the bytes of the text, and joined they are the text."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from mpidp.data.token_bytes import bytes_of_tokens
from mpidp.data.tokenizer import ByteTokenizer, CharTokenizer, HFTokenizer, Tokenizer
from mpidp.inference.detokenize import detokenizer_of
from mpidp.inference.speech import StreamedText
from tests.unit.small_tokenizers import byte_level, sentencepiece, wordpiece

TEXTS = ["hello there", "aa bb", "the fox says naïve 日本語 😀😁.", "a\nb\n\n", "4", "日本", "é", "+=?!", ""]
KINDS = {
    "byte": ByteTokenizer(), "char": CharTokenizer("".join(sorted(set("".join(TEXTS))))), "gpt2": byte_level(),
    "gpt2 with a prefix": byte_level(prefix=True), "llama2": sentencepiece(), "always": sentencepiece("always"),
    "first": sentencepiece("first"), "gemma": sentencepiece("none"),
    "never": sentencepiece("never"),
}
every = pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)


def first_of(length: int) -> np.ndarray:
    return np.arange(length) == 0


@every
def test_the_bytes_of_a_texts_tokens_are_those_of_the_text(tokenizer: Tokenizer) -> None:
    of = bytes_of_tokens(tokenizer)
    assert of is not None
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert of.count(ids, first_of(len(ids))).sum() == len(text.encode()), text
    whole = [np.append(tokenizer.encode(text), tokenizer.eod) for text in TEXTS]
    ids, first = np.concatenate(whole), np.concatenate([first_of(len(one)) for one in whole])
    assert of.count(ids, first).sum() == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("prefix", ["prepend", "always", "first", "none"])
def test_a_space_after_an_added_token_is_no_text_where_the_tokenizer_put_it(prefix: str) -> None:
    tokenizer = sentencepiece(prefix)
    parsed = tokenizer._tokenizer  # type: ignore[attr-defined]
    parsed.encode_special_tokens = False
    text = "hello<|turn|>aa<|turn|>bb"
    ids, of = np.array(parsed.encode(text).ids), bytes_of_tokens(tokenizer)
    assert of is not None and of.count(ids, first_of(len(ids))).sum() == len(text)


def test_unknown_decoders_have_no_known_bytes() -> None:
    assert bytes_of_tokens(wordpiece()) is None


def said(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    pieces: list[str] = []
    stream = StreamedText(detokenizer_of(tokenizer, prompt), (), pieces.append)
    assert not any(stream.add(i) for i in ids)
    assert stream.end() == "".join(pieces)
    return "".join(pieces)


@every
def test_what_follows_a_prompt_is_the_rest_of_the_text(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        for cut in range(len(ids) + 1):
            begun = said(tokenizer, [], ids[:cut])
            if "\ufffd" not in begun:  # the cut is not within a character
                assert begun + said(tokenizer, ids[:cut] or [], ids[cut:]) == said(tokenizer, [], ids) == tokenizer.decode(ids)
        assert said(tokenizer, [tokenizer.eod], ids) == tokenizer.decode(ids)


@pytest.mark.parametrize(("prompt", "more", "wanted"), [
    ("a😀", "😁", "😁"), ("aé", "é", "é"), ("日本", "語", "語"), ("日", "本語 ok", "本語 ok"), ("hello", " there", " there"),
])
def test_bytes_after_a_prompt_that_ends_in_bytes(prompt: str, more: str, wanted: str) -> None:
    tokenizer = sentencepiece()
    before, whole = tokenizer.encode(prompt).tolist(), tokenizer.encode(prompt + more).tolist()
    assert whole[: len(before)] == before
    assert said(tokenizer, before, whole[len(before) :]) == wanted


@pytest.mark.parametrize("prefix", ["never", "none"])
def test_a_space_at_the_beginning_is_kept_where_the_tokenizer_puts_none(prefix: str) -> None:
    tokenizer = sentencepiece(prefix)
    for text in (" a", "  hello", " "):
        ids = tokenizer.encode(text).tolist()
        assert said(tokenizer, [tokenizer.eod], ids) == tokenizer.decode(ids) == text


@every
def test_any_ids_are_decoded_as_by_the_library(tokenizer: Tokenizer) -> None:
    """Also where bytes form no character. (The library replaces a whole run of bytes if one of its characters is wrong.)"""
    generator = random.Random(0)
    for _ in range(200):
        ids = [i for i in generator.choices(range(tokenizer.vocab_size), k=12) if i != tokenizer.eod]
        whole, found = tokenizer.decode(ids), said(tokenizer, [], ids)
        assert found == whole or "\ufffd" in whole and "\ufffd" in found and isinstance(tokenizer, HFTokenizer)


def test_a_tokenizer_of_unknown_bytes_is_decoded_with_context() -> None:
    tokenizer = wordpiece()
    ids = tokenizer.encode("hello foxes. yes").tolist()
    assert said(tokenizer, ids[:1], ids[1:]) == tokenizer.decode(ids).removeprefix("hello")


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece(), wordpiece()], ids=["gpt2", "llama2", "bert"])
def test_decoding_calls_do_not_grow_with_the_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    plain = tokenizer.decode

    def counted(ids: list[int]) -> str:
        decoded.append(len(ids))
        return plain(ids)

    monkeypatch.setattr(tokenizer, "decode", counted)
    stream = StreamedText(detokenizer_of(tokenizer, [5]), ["STOP"])
    for i in range(2000):
        stream.add(2 + i % 5)
    assert max(decoded, default=0) <= 16

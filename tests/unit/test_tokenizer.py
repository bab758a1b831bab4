"""Laws of the tokenizers: decoding restores the text, byte counts add up, text never produces EOD, and bad files are rejected."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidp.data.token_bytes import bytes_of_tokens
from mpidp.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    Tokenizer,
    load_tokenizer,
    token_dtype,
    tokenizer_from_json,
    train_bpe,
)
from mpidp.errors import DataError, UsageError

TEXTS = ["To be, or not to be: that is the question.\n", "f(x)\n    return x  # ünïcödé 漢字 🙂\n", "\r\n\t  a  \n\n\n b"]
TEXTS *= 20
ALPHABET = "".join(sorted(set("".join(TEXTS)) | set("<|endoftext|>")))
TOKENIZERS = {"byte": ByteTokenizer(), "char": CharTokenizer(ALPHABET), "bpe": train_bpe(iter(TEXTS), 300)}
texts = st.text(alphabet=ALPHABET, max_size=200)


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


def count_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    of = bytes_of_tokens(tokenizer)
    assert of is not None
    return int(of.count(ids, np.zeros(len(ids), dtype=np.bool_)).sum())


@settings(max_examples=60, deadline=None)
@given(texts)
def test_text_comes_back_and_its_bytes_are_counted(text: str) -> None:
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64 and ids.ndim == 1 and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text
        assert count_bytes(tokenizer, ids) == len(text.encode())
        with_eod = np.append(ids, tokenizer.eod)
        assert tokenizer.decode(with_eod) == text and count_bytes(tokenizer, with_eod) == len(text.encode())


@settings(max_examples=20, deadline=None)
@given(texts, st.integers(0, 200))
def test_bytes_add_up_wherever_the_tokens_are_cut(text: str, cut: int) -> None:
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode(text)
        assert count_bytes(tokenizer, ids[:cut]) + count_bytes(tokenizer, ids[cut:]) == len(text.encode())


def test_a_batch_is_its_texts(tokenizer: Tokenizer) -> None:
    for ids, text in zip(tokenizer.encode_batch(TEXTS[:3]), TEXTS, strict=False):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|><|endoftext|>b"])
def test_text_never_gives_the_eod(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.eod not in ids and tokenizer.decode(ids) == text


def test_an_eod_that_is_not_marked_special_never_comes_from_text() -> None:
    parsed = json.loads(TOKENIZERS["bpe"].to_json())
    for added in parsed["added_tokens"]:
        added["special"] = False
    tokenizer = tokenizer_from_json(json.dumps(parsed))
    for text in ("<|endoftext|>", "x<|endoftext|><|endoftext|>y", "<|endo<|endoftext|>ftext|>"):
        ids = tokenizer.encode(text)
        assert tokenizer.eod not in ids and tokenizer.decode(ids) == text


def test_truncation_padding_and_bos_of_a_file_are_not_applied() -> None:
    parsed = json.loads(TOKENIZERS["bpe"].to_json())
    parsed["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    parsed["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                         "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    tokenizer = tokenizer_from_json(json.dumps(parsed))
    np.testing.assert_array_equal(tokenizer.encode(TEXTS[0]), TOKENIZERS["bpe"].encode(TEXTS[0]))


def test_storing_and_loading_changes_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.to_json().encode())
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert (loaded.kind, loaded.vocab_size, loaded.eod) == (tokenizer.kind, tokenizer.vocab_size, tokenizer.eod)
        assert loaded.to_json() == tokenizer.to_json()
        np.testing.assert_array_equal(loaded.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))


def test_the_eod_of_an_unusual_file_is_named_or_in_the_index(tmp_path: Path) -> None:
    text = TOKENIZERS["bpe"].to_json().replace("<|endoftext|>", "<stop>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match="--eod"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="<nothing>"):
        load_tokenizer(tmp_path, eod="<nothing>")
    assert load_tokenizer(tmp_path, eod="<stop>").eod == 0
    for ours in (ByteTokenizer(), CharTokenizer("abc")):
        with pytest.raises(DataError, match="--eod <stop>: a tokenizer of mpidp has an end-of-document token of its own. Omit"):
            tokenizer_from_json(ours.to_json(), "<stop>")
        assert tokenizer_from_json(ours.to_json(), ours.eod).eod == ours.eod
    (tmp_path / "index.json").write_text('{"eod": 0}')
    assert load_tokenizer(tmp_path).eod == 0


def test_training_is_repeatable() -> None:
    assert train_bpe(iter(TEXTS), 280).to_json() == train_bpe(iter(TEXTS), 280).to_json()


def test_a_tokenizer_of_words_decodes_what_it_encodes() -> None:
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "hello": 1, "wörld": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = HFTokenizer(words.to_str())
    assert tokenizer.decode(tokenizer.encode("hello wörld")) == "hello wörld"


def test_decoding_survives_any_id(tokenizer: Tokenizer) -> None:
    tokenizer.decode([-1, 0, 200, 255, 256, 10**6])
    assert ByteTokenizer().decode([72, 0xFF]) == "H\ufffd"


def test_an_unknown_character_is_named() -> None:
    with pytest.raises(DataError, match=r"U\+00DF"):
        CharTokenizer("abc").encode("abß")


@pytest.mark.parametrize("size", [0, 256, 10**9])
def test_a_bpe_vocabulary_has_bounds(size: int) -> None:
    with pytest.raises(UsageError, match="257"):
        train_bpe(iter(TEXTS), size)


def test_dtypes() -> None:
    assert token_dtype(65536) == np.uint16 and token_dtype(65537) == np.uint32


OURS = {"format": "mpidp-tokenizer", "version": 1}
BAD = [
    "", "{", "[]", "null", "[" * 100_000, '{"model": {}}', '{"a": 1}', json.dumps(OURS), json.dumps(OURS | {"kind": "x"}),
    json.dumps(OURS | {"kind": "byte", "version": 2}), json.dumps(OURS | {"kind": "char"}),
    json.dumps(OURS | {"kind": "char", "characters": 5}), json.dumps(OURS | {"kind": "char", "characters": ""}),
    json.dumps(OURS | {"kind": "char", "characters": "aa"}), json.dumps(OURS | {"kind": "char", "characters": "\ud800"}),
    TOKENIZERS["bpe"].to_json()[:-10], TOKENIZERS["bpe"].to_json().replace('"id":0', '"id":99999999999'),
    TOKENIZERS["bpe"].to_json().replace('"merges":[', '"merges":[["zz","zzz"],'),
]


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_malformed_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(DataError, match="tokenizer.json"):
        load_tokenizer(path)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        load_tokenizer(tmp_path)

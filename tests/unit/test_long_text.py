"""Law of long texts: in pieces cut anywhere, they encode to the ids of the whole text."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.prepare import prepare
from mpidp.data import long_text
from mpidp.data.encoder import Encoder
from mpidp.data.shards import TokenStream
from mpidp.data.special_tokens import SpecialTokens
from mpidp.data.tokenizer import ByteTokenizer, CharTokenizer, HFTokenizer, Tokenizer

SENTENCES = [
    "aa bb cc dd", "the fox says 2+2=4, doesn't it?", "  indented  \t text", "zwölf Boxkämpfer 🥊", "日本語のテキスト",
    "1234567 890",
]


def texts(seed: int, count: int = 350) -> dict[str, str]:
    """Return texts of about 7,000 characters."""
    drawn = random.Random(seed)
    some = [drawn.choice(SENTENCES) for _ in range(count)]
    return {
        "lines": "\n".join(some), "one line": " ".join(some), "no blank": "".join(some).replace(" ", ""), "run": "a" * 7_001,
        "period": "abcab" * 1_401, "words": "aa bb cc " * 800, "blanks": "x" + " " * 5_000 + "y", "digits": "7" * 6_000,
        "letters": "".join(drawn.choices("ab c", k=7_000)), "newlines": "\n" * 5_000 + "a",
    }


def library(kind: str) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "llama":  # in the manner of Llama 2: a space in front, no pre-tokenizer, bytes for unknown characters
        names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *string.ascii_letters, *string.digits]
        merges = [("a", "a"), ("aa", "aa"), ("\u2581", "aa"), ("\u2581", "a"), ("b", "c"), ("\u2581", "\u2581"), ("7", "7")]
        vocab = {name: i for i, name in enumerate([*names, *("".join(pair) for pair in merges)])}
        made = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        made.add_special_tokens(["<s>", "</s>"])
        return made
    special, model, trainer = ["</s>", "<unk>"], models.BPE(unk_token="<unk>"), trainers.BpeTrainer
    options: dict[str, Any] = {"vocab_size": 400, "special_tokens": special, "show_progress": False}
    if kind == "wordpiece":
        model, trainer = models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer
    if kind == "unigram":
        model, trainer = models.Unigram(), trainers.UnigramTrainer
        options["unk_token"] = "<unk>"
    made = tokenizers.Tokenizer(model)
    if kind.startswith("bytes"):
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes with prefix")
        made.post_processor = processors.ByteLevel(trim_offsets=True)
        options["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
    elif kind == "wordpiece":
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if kind == "metaspace" else "first")
    made.train_from_iterator([*SENTENCES * 20, *(f"{i} hello there abcab aa bb cc" for i in range(300))], trainer(**options))
    return made


KINDS = ["llama", "bytes", "bytes with prefix", "metaspace", "unigram", "wordpiece"]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> HFTokenizer:
    return HFTokenizer(library(request.param).to_str(), "</s>")


def pieces_of(text: str, seed: int, size: int) -> list[str]:
    drawn, at, found = random.Random(seed), 0, []
    while at < len(text):
        step = drawn.randint(1, size)
        found.append(text[at : at + step])
        at += step
    return found


@pytest.mark.parametrize("seed", range(2))
def test_pieces_encode_to_the_ids_of_the_whole(tokenizer: HFTokenizer, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: (text, tokenizer.encode(text)) for name, text in texts(seed).items()}
    monkeypatch.setattr(long_text, "OVERLAP", 256)
    for window in (512, 3000):
        monkeypatch.setattr(long_text, "WINDOW", window)
        for name, (text, expected) in whole.items():
            for pieces in (pieces_of(text, seed, 700), [text]):
                found = np.concatenate(list(tokenizer.encode_pieces(pieces)))
                assert np.array_equal(found, expected), (name, window, len(found), len(expected))


def test_windows_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "OVERLAP", 256)
    monkeypatch.setattr(long_text, "WINDOW", 1000)
    tokenizer, longest = HFTokenizer(library("llama").to_str(), "</s>"), 0
    encode: Callable[[str], long_text.Placed] = tokenizer._placed

    def measured(text: str) -> long_text.Placed:
        nonlocal longest
        longest = max(longest, len(text))
        return encode(text)

    for text in texts(0).values():
        list(long_text.encode_pieces([text], measured))
    assert longest <= 2300


@pytest.mark.parametrize("special", ["text", "tokens"])
def test_names_of_special_tokens_across_pieces(special: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = HFTokenizer(library("metaspace").to_str(), "</s>")
    text = "aa bb </s> cc </s>dd\n" * 500
    expected = Encoder(tokenizer, SpecialTokens(None, ()), special).batch([text])[0]
    monkeypatch.setattr(long_text, "OVERLAP", 256)
    monkeypatch.setattr(long_text, "WINDOW", 1000)
    for seed in range(3):
        found = np.concatenate(list(Encoder(tokenizer, SpecialTokens(None, ()), special).pieces(pieces_of(text, seed, 50))))
        assert np.array_equal(found, expected) and (tokenizer.eod in found) == (special == "tokens")


def test_texts_without_any_place_to_cut_are_cut_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("OVERLAP", 64), ("WINDOW", 200), ("MAX_WINDOW", 1000)):
        monkeypatch.setattr(long_text, name, value)
    tokenizer = HFTokenizer(library("wordpiece").to_str(), "</s>")  # a word of more than 100 characters is one unknown token
    assert len(np.concatenate(list(tokenizer.encode_pieces(["q" * 5000])))) >= 1


def test_an_empty_range_holds_no_token() -> None:
    placed = long_text.Placed(np.array([7]), np.array([0]), np.array([4]))
    assert [placed.holds(*place).tolist() for place in ((2, 3), (2, 2), (0, 0), (4, 4))] == [[True], [False], [False], [False]]


@pytest.mark.parametrize("small", [ByteTokenizer(), CharTokenizer("ab \n")], ids=["byte", "char"])
def test_small_tokenizers(small: Tokenizer) -> None:
    text = "ab a\nb" * 500
    assert np.array_equal(np.concatenate(list(small.encode_pieces(pieces_of(text, 0, 9)))), small.encode(text))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_prepare_gives_the_ids_of_the_whole_document(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = texts(0)["one line"]
    (tmp_path / "tokenizer.json").write_text(library("llama").to_str())
    (tmp_path / name).write_text(text if name == "a.txt" else json.dumps({"text": text}) + "\n")
    expected = HFTokenizer((tmp_path / "tokenizer.json").read_text(), "</s>").encode(text).tolist()
    for module in ("data_tools.encode", "mpidp.data.long_text"):
        monkeypatch.setattr(f"{module}.WINDOW", 1000)
    monkeypatch.setattr(long_text, "OVERLAP", 256)
    monkeypatch.setattr("data_tools.sources.PIECE_BYTES", 300)
    prepare(str(tmp_path / name), str(tmp_path / "tokenizer.json"), tmp_path / "out", 1, 0.0, bos="none")
    stream = TokenStream(tmp_path / "out", "train")
    stream.check()
    assert stream.read(0, stream.num_tokens).tolist() == [*expected, 2]

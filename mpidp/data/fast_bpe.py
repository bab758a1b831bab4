"""Encodes text with tiktoken. It gives the same ids as the `tokenizers` library in about a sixth of the CPU time.

tiktoken is used only if the ids are provably equal. Both programs split a text into words with a regular expression, and apply
byte-pair encoding to each word. This module checks both parts:

- Merges. tiktoken joins any two neighbouring tokens whose joined bytes are a token. `tokenizers` joins only the pairs in its
  list. Both join the pair of lowest rank first. The joins that form a token do not depend on the bytes around this token.
  Therefore each token can be checked alone: if tiktoken encodes only the bytes of the token, the last pair that it joins must be
  in the list of `tokenizers`. If this holds for all tokens, the ids are equal.
- Words. The regular-expression engines of the two programs can have different versions of Unicode. Therefore each character is
  tested in several contexts when it first occurs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from mpidp.data.long_text import Placed

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = (  # Split patterns in the tokenizer.json of Llama 3 and Qwen 2; both programs treat them in the same way
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
CONTEXTS = ("a{0}a", "1{0}1", ".{0}.", " {0} ", "{0}{0}", "\n{0}\n", "'{0}'s{0}", " {0}a", "A{0}1")  # texts around a character
LONG_SPACE = 2**18  # consecutive white-space characters that tiktoken does not get; it fails at a million
SPACE = re.compile(rf"\s{{{LONG_SPACE}}}")
KNOWN = {"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
         "ignore_merges", "vocab", "merges"}


class NotEqual(Exception):
    """It is not proved that tiktoken gives the same ids as the `tokenizers` library. The message is the reason."""


class FastBPE:
    """A byte-level BPE tokenizer that uses tiktoken."""

    def __init__(self, text: str, library: Any) -> None:
        """`text`: the contents of a tokenizer.json. `library`: the same tokenizer, as an object of the `tokenizers` library.
        Raises NotEqual if tiktoken cannot be used for this tokenizer."""
        try:
            import tiktoken
        except ImportError:
            raise NotEqual("tiktoken is not installed (pip install 'mpidp[data]')") from None
        parsed = json.loads(text)
        self._library, self._seen = library, np.zeros(0x110000, dtype=bool)
        pairs = _pairs_of_tokens(parsed)
        ranks = {bytes([byte]): byte for byte in range(256)} | {token: rank for rank, token in enumerate(pairs, 256)}
        check_pairs(pairs, ranks)
        added = {token["content"] for token in parsed.get("added_tokens") or ()}
        by_bytes = {_bytes(name): i for name, i in parsed["model"]["vocab"].items() if name not in added}
        if by_bytes.keys() != ranks.keys():
            raise NotEqual("some tokens of the tokenizer are neither bytes nor results of merges")
        if parsed["model"].get("ignore_merges") and (words := [name for name in added if self._is_word(name)]):
            raise NotEqual(f"only the tokenizers library can encode a word of the text as the special token {words[0]!r}")
        self._ids = np.array([by_bytes[token] for token in ranks], dtype=np.int64)
        self._lengths = np.zeros(max(by_bytes.values()) + 1, dtype=np.int64)  # number of bytes of each id
        for token, i in by_bytes.items():
            self._lengths[i] = len(token)
        self._pattern = _pattern(parsed)
        self._core = tiktoken.Encoding("mpidp", pat_str=self._pattern, mergeable_ranks=ranks, special_tokens={})._core_bpe
        self._check_characters("".join(map(chr, range(128))))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int64 (n,). Raises NotEqual if tiktoken and `tokenizers` treat a character differently.
        Independent."""
        for text in texts:
            if not text.isascii():
                self._check_characters(text)
        return list(map(self._encode, texts) if self._threads is None else self._threads.map(self._encode, texts))

    def placed(self, text: str) -> Placed:
        """Return the ids of a text, and for each id the range of characters that it encodes. Raises NotEqual if tiktoken and
        `tokenizers` treat a character differently. Independent."""
        ids = self.encode_batch([text])[0]
        stops = np.cumsum(self._lengths[ids])  # in bytes
        starts = stops - self._lengths[ids]
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        character = np.cumsum((data & 0xC0) != 0x80) - 1  # index of each byte's character; 10xxxxxx continues a character
        return Placed(ids, character[starts], character[stops - 1] + 1)

    @cached_property
    def _words(self) -> Any:
        """A tiktoken encoding for comparing how texts are split into words. It splits texts with the pattern of this tokenizer.
        Its tokens are all bytes and all pairs of bytes."""
        import tiktoken

        return tiktoken.Encoding("words", pat_str=self._pattern, mergeable_ranks=_pairs(), special_tokens={})

    @cached_property
    def threads(self) -> int:
        """The number of threads that encode texts. It is the number that the `tokenizers` library uses."""
        if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "off", "no", "f", "n", "0"):
            return 1
        named = os.environ.get("RAYON_NUM_THREADS", "")
        return int(named) if named.isdigit() and int(named) else len(os.sched_getaffinity(0))

    @cached_property
    def _threads(self) -> ThreadPoolExecutor | None:
        return ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def _is_word(self, name: str) -> bool:
        """Return whether the pre-tokenizer leaves the text of the token `name` as a single word."""
        try:
            text = _bytes(name).decode()
        except (NotEqual, UnicodeDecodeError):
            return False
        return [word for word, _ in self._library.pre_tokenizer.pre_tokenize_str(text)] == [name]

    def _encode(self, text: str) -> np.ndarray:
        if len(text) >= LONG_SPACE and SPACE.search(text):
            return np.array(self._library.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        found: np.ndarray = self._ids[np.array(self._core.encode_ordinary(text), dtype=np.int64)]
        return found

    def _check_characters(self, text: str) -> None:
        """Check those characters of the text that were not checked before. Raises NotEqual if tiktoken and `tokenizers` split
        texts with such a character into different words."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        new = np.unique(codes[~self._seen[codes]])
        if not len(new):
            return
        sample = "".join(context.format(chr(code)) for code in new.tolist() for context in CONTEXTS)
        words = [_bytes(word) for word, _ in self._library.pre_tokenizer.pre_tokenize_str(sample)]
        ids = [i for word in words for i in self._words._core_bpe.encode_single_piece(word)]
        if ids != self._words.encode_ordinary(sample):  # each pair of bytes is a token, so different words give different ids
            raise NotEqual("tiktoken splits text into different words at a character in the range "
                           f"{chr(new[0])!r} to {chr(new[-1])!r}")
        self._seen[new] = True


def check_pairs(pairs: Mapping[bytes, Collection[tuple[bytes, bytes]]], ranks: Mapping[bytes, int]) -> None:
    """For each token, find the last pair that tiktoken joins to get the token. Raise NotEqual if this pair is not in the
    token's list. `pairs`: for each token, the list of pairs of tokens that a merge joins to this token. `ranks`: the rank of
    each token in tiktoken. Pure."""
    for word, listed in pairs.items():
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 2:
            found = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts))]
            rank, i = min(found)
            if rank >= ranks[word]:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if tuple(parts) not in listed:
            raise NotEqual(f"tiktoken forms the token {word!r} from another pair of tokens than the tokenizers library")


def _pairs_of_tokens(parsed: dict[str, Any]) -> dict[bytes, list[tuple[bytes, bytes]]]:
    """Return, for each token in order of rank, the pairs of tokens that the merges join to this token. In a tokenizer that was
    converted from tiktoken, a token can have several pairs. Raises NotEqual if the tokenizer is not plain byte-level BPE."""
    model = parsed["model"]
    plain = {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"}
    if model.get("type") != "BPE" or model.keys() - KNOWN or any(model.get(key) for key in plain) or parsed.get("normalizer"):
        raise NotEqual("the tokenizer is not plain byte-level BPE")
    if any(not token.get("special") for token in parsed.get("added_tokens") or ()):
        raise NotEqual("some `added_tokens` of the tokenizer are not special tokens")
    found: dict[bytes, list[tuple[bytes, bytes]]] = {}
    last = b""
    for merge in model["merges"]:
        one, other = map(_bytes, merge.split(" ") if isinstance(merge, str) else merge)
        if one + other != last and one + other in found:
            raise NotEqual(f"the merges that form the token {one + other!r} do not follow each other")
        last = one + other
        found.setdefault(last, []).append((one, other))
    return found


def _pattern(parsed: dict[str, Any]) -> str:
    """Return the regular expression with which the pre-tokenizer splits texts. Raises NotEqual if the pre-tokenizer is not
    known."""
    found = parsed.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", []) if found.get("type") == "Sequence" else [found]
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return GPT2
        if len(steps) == 2 and not last.get("use_regex", True):
            split = steps[0]
            pattern = str((split.get("pattern") or {}).get("Regex"))
            is_plain = (split.get("type"), split.get("behavior"), split.get("invert")) == ("Split", "Isolated", False)
            if is_plain and pattern in PATTERNS:
                return pattern
    raise NotEqual("mpidp does not know how the pre-tokenizer splits text")


def _pairs() -> dict[bytes, int]:
    """Return a vocabulary of all bytes and all pairs of bytes, as {bytes: id}. Pure."""
    single = {bytes([byte]): byte for byte in range(256)}
    return single | {bytes(divmod(number, 256)): 256 + number for number in range(65536)}


def byte_names() -> list[str]:
    """Return the 256 characters that stand for the bytes in byte-level BPE (GPT-2). Printable characters stand for their own
    bytes. Characters from U+0100 on stand for the other bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


BYTE_OF = {name: byte for byte, name in enumerate(byte_names())}


def _bytes(name: str) -> bytes:
    """Return the bytes of the token `name`. Raises NotEqual if `name` has a character that does not stand for a byte in
    byte-level BPE."""
    try:
        return bytes(BYTE_OF[character] for character in name)
    except KeyError:
        raise NotEqual(f"the token {name!r} is not a token of byte-level BPE") from None

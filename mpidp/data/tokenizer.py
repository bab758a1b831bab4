"""Defines the tokenizers, which encode text to ids and decode ids to text. A tokenizer is stored as DIR/tokenizer.json.

| kind | vocabulary | end of document (EOD) | file format |
|---|---|---|---|
| byte | the 256 bytes of UTF-8 | id 256 | mpidp's JSON |
| char | one id per distinct character of the corpus, by code point | the last id | mpidp's JSON |
| bpe | byte-level BPE trained on the corpus, or a Hugging Face tokenizer.json | one of its tokens | Hugging Face's |

Encoding never produces the EOD id, even if the text contains the name of the EOD token. Independent.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mpidp.data.batch_encoder import BatchEncoder
from mpidp.data.end_of_document import USUAL_EOD, declared_eos, find_eod, stored_eod
from mpidp.data.long_text import WINDOW, Placed, encode_pieces, joined
from mpidp.errors import DataError, UsageError
from mpidp.runtime.files import open_regular

FORMAT = "mpidp-tokenizer"
MAX_FILE_BYTES = 256 * 2**20  # no tokenizer in use is larger; limits the memory that a malicious file can use
MAX_VOCAB = 2**24


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest dtype of shards that can store the ids 0..vocab_size-1."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<u4")


class Tokenizer(ABC):
    """The interface of all tokenizers. Ids are int64 arrays of shape (n,)."""

    kind: str
    vocab_size: int  # all ids, including EOD, are below vocab_size
    eod: int
    program: str = ""  # the program that encodes, and the reason for this program; "" if there is no choice
    bos: int | None = None  # the id of the beginning-of-sequence token, if the tokenizer adds one; encode() omits it

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, without BOS and EOD. Raises DataError if a character is not in a char vocabulary."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, as encode() does."""
        return [self.encode(text) for text in texts]

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Encode one text, which is given as consecutive pieces. A piece may end anywhere. Yield arrays whose concatenation is
        the ids of the whole text. Memory use does not depend on the length of the text."""
        yield from (self.encode(piece) for piece in pieces)

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text that the ids encode. EOD is dropped. Bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def to_json(self) -> str:
        """Return the contents of tokenizer.json. For a tokenizer from a Hugging Face file, return the contents of that
        file."""


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte."""

    kind = "byte"
    vocab_size = 257
    eod = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        array = _array(ids)
        return array[(array >= 0) & (array < 256)].astype(np.uint8).tobytes().decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": 1, "kind": "byte"}) + "\n"


class CharTokenizer(Tokenizer):
    """One token per character, for small corpora. `characters`: the characters in the order of their ids, without repetition."""

    kind = "char"

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.eod = len(characters)
        self.vocab_size = self.eod + 1
        self._codes = np.frombuffer(characters.encode("utf-32-le"), dtype="<u4")
        if not characters or len(np.unique(self._codes)) != len(self._codes):
            raise DataError("a char tokenizer needs at least one character, and must not contain a character twice")
        self._id_of = np.full(0x110000, -1, dtype=np.int64)
        self._id_of[self._codes] = np.arange(self.eod)

    def encode(self, text: str) -> np.ndarray:
        ids: np.ndarray = self._id_of[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")]
        if ids.size and ids.min() < 0:
            unknown = text[int(np.argmin(ids))]
            raise DataError(f"character {unknown!r} (U+{ord(unknown):04X}) is not among the {self.eod} characters of "
                            "the char tokenizer. Prepare the shards again with this text, or use --tokenizer byte")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        kept = (i for i in _array(ids).tolist() if i != self.eod)
        return "".join(self.characters[i] if 0 <= i < self.eod else "\ufffd" for i in kept)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": 1, "kind": "char", "characters": self.characters}) + "\n"


class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json, used through the `tokenizers` library.

    `text`: the file's contents. `eod`: the end-of-document token or its id. If `eod` is None, find_eod() chooses the token.
    `declared`: the eos_token that the model's files declare, or None. Raises DataError if the file is malformed or has no
    end-of-document token. Encoding adds no special tokens, and does not truncate or pad.
    """

    kind = "bpe"

    def __init__(self, text: str, eod: str | int | None = None, declared: str | None = None) -> None:
        self._text = text
        self._tokenizer = tokenizer = _parse_hf(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # treat "<|endoftext|>" in a text as plain text
        vocab: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise DataError("tokenizer.json has an empty vocabulary; choose another tokenizer")
        self.vocab_size = max(vocab.values()) + 1
        if self.vocab_size > MAX_VOCAB:
            raise DataError(f"tokenizer.json has an id above {MAX_VOCAB}; choose another tokenizer")
        self.eod = find_eod(vocab, eod, declared)
        self._encoder = BatchEncoder(text, tokenizer)
        plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        self.bos = whole[0] if len(plain) and whole[1 : 1 + len(plain)] == plain else None

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        short = [text for text in texts if len(text) <= WINDOW]
        found = (self._without_eod(text, ids) for text, ids in zip(short, self._encoder.batch(short), strict=True))
        return [next(found) if len(text) <= WINDOW else np.concatenate(list(self.encode_pieces([text]))) for text in texts]

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        return encode_pieces(pieces, self._window)

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in _array(ids).tolist() if i != self.eod and 0 <= i < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=False))

    def to_json(self) -> str:
        return self._text

    @property
    def program(self) -> str:  # type: ignore[override]
        return self._encoder.program

    def _without_eod(self, text: str, ids: np.ndarray) -> np.ndarray:
        """Return `ids`, the ids of the text, if EOD is not among them. Otherwise, encode the text again, without EOD."""
        return self._placed(text).ids if (ids == self.eod).any() else ids

    def _window(self, text: str) -> Placed:
        placed = self._encoder.placed(text)
        return self._placed(text) if (placed.ids == self.eod).any() else placed

    def _placed(self, text: str) -> Placed:
        return placed_without(self._tokenizer, text, self.eod)


def placed_without(library: Any, text: str, eod: int) -> Placed:
    """Encode a text so that its ids do not contain `eod`. `library`: a tokenizer of the `tokenizers` library. If the ids of the
    whole text contain `eod`, the text is cut inside each occurrence of this token's name, and the parts are encoded separately.
    Pure."""
    encoding = library.encode(text, add_special_tokens=False)
    name = str(library.id_to_token(eod))
    if eod not in encoding.ids or name not in text or len(name) < 2:
        return joined([(0, encoding)])
    cuts = [0]
    while (at := text.find(name, cuts[-1])) >= 0:
        cuts.append(at + len(name) // 2)
    parts = zip(cuts, [*cuts[1:], len(text)], strict=True)
    return joined([(start, library.encode(text[start:stop], add_special_tokens=False)) for start, stop in parts])


def load_tokenizer(path: str | Path, eod: str | int | None = None) -> Tokenizer:
    """Load a tokenizer.json. `path`: the file, or a folder of shards or of a run that contains it. Independent.

    `eod`: for Hugging Face files, the token that ends a document, or its id. If `eod` is None, the id that is stored in the
    folder of shards or of the run is used. If no id is stored, find_eod() chooses the token. Raises DataError if the file is
    missing, malformed or too large.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        with open_regular(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise DataError(f"larger than {MAX_FILE_BYTES} bytes, so it is not a tokenizer.json")
        eod = stored_eod(path.parent) if eod is None else eod
        return tokenizer_from_json(data.decode(), eod, declared_eos(path.parent) if eod is None else None)
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}; a tokenizer.json is needed") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text, so it is not a tokenizer.json") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def tokenizer_from_json(text: str, eod: str | int | None = None, declared: str | None = None) -> Tokenizer:
    """Make a tokenizer from `text`, the contents of a tokenizer.json (mpidp's or Hugging Face's). Raises DataError if `text`
    is malformed.

    `eod` and `declared` are used only for Hugging Face's files (see HFTokenizer). If the file is mpidp's and `eod` is the name of
    a token, raises DataError.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error}); restore the file or prepare the shards again") from None
    if not isinstance(parsed, dict):
        raise DataError("not a tokenizer.json: the top level must be an object")
    if parsed.get("format") != FORMAT:
        return HFTokenizer(text, eod, declared)
    if isinstance(eod, str):
        raise DataError(f"--eod {eod}: a tokenizer of mpidp has an end-of-document token of its own. Omit --eod")
    kind, characters = parsed.get("kind"), parsed.get("characters")
    if parsed.get("version") != 1 or kind not in ("byte", "char"):
        raise DataError(f"version {parsed.get('version')!r} of a tokenizer of kind {kind!r} is unknown. This mpidp reads version "
                        "1 of the kinds byte and char: the file is damaged, or was written by a newer mpidp")
    if kind == "byte":
        return ByteTokenizer()
    if not isinstance(characters, str) or any(0xD800 <= ord(c) < 0xE000 for c in characters):
        raise DataError("a char tokenizer must have its characters as one valid string; prepare the shards again")
    return CharTokenizer(characters)


def check_bpe_size(vocab_size: int, option: str = "") -> None:
    """Raise UsageError if byte-level BPE cannot have `vocab_size` ids, or if the `tokenizers` library is missing. `option`:
    the value of --tokenizer, for the error message. Independent."""
    if not 257 <= vocab_size <= MAX_VOCAB:
        raise UsageError(f"--tokenizer {option or f'bpe:{vocab_size}'}: the vocabulary size must be in 257..{MAX_VOCAB} "
                         "(256 bytes and the end-of-document token already need 257 ids)")
    _library()


def train_bpe(texts: Iterator[str], vocab_size: int) -> HFTokenizer:
    """Train byte-level BPE with at most `vocab_size` ids, and return the tokenizer. Id 0 is EOD, and the next 256 ids are the
    bytes. The same texts give the same tokenizer.

    Raises UsageError if vocab_size is below 257 or the `tokenizers` library is missing. Independent.
    """
    check_bpe_size(vocab_size)
    tokenizers = _library()
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[USUAL_EOD[0]], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    return HFTokenizer(tokenizer.to_str(), eod=0)


def _array(ids: Iterable[int]) -> np.ndarray:
    return np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UsageError("`tokenizers` is not installed. Run pip install tokenizers, or use --tokenizer byte or char") from None
    return tokenizers


def _parse_hf(text: str) -> Any:
    try:
        return _library().Tokenizer.from_str(text)
    except (UsageError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        raise DataError(f"not a tokenizer.json that the `tokenizers` library can read ({error})") from None

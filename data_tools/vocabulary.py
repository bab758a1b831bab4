"""Makes the tokenizer of the shards: loads a given tokenizer, or builds one from the corpus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from data_tools.counts import Counts
from data_tools.files import SourceFile
from data_tools.progress import MEGABYTE, Ticker
from data_tools.sources import SourceReader
from data_tools.team import Team
from mpidp.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    check_bpe_size,
    load_tokenizer,
    tokenizer_from_json,
    train_bpe,
)
from mpidp.errors import DataError, UsageError

BPE_TRAINING_CHARACTERS = 64 * 2**20  # limit of the training text; files are read in the order of the hash of their names
SLOW_CHARACTERS = 16 * 10**6  # training on a text of at least this length takes many seconds


def check_tokenizer(spec: str) -> None:
    """Raise UsageError unless `spec` is byte, char, bpe:VOCAB or an existing path. Independent."""
    kind, colon, size = spec.partition(":")
    if kind == "bpe" and colon:
        check_bpe_size(int(size) if size.isascii() and size.isdigit() else 0, spec)
    elif spec not in ("byte", "char") and not Path(spec).exists():
        raise UsageError(f"--tokenizer '{spec}' must be 'byte', 'char', 'bpe:VOCAB' (for example 'bpe:8192'), or the path of an "
                         "existing tokenizer.json or its folder")


def given_tokenizer(spec: str, eod: str | None) -> Tokenizer | None:
    """Load the tokenizer at the path `spec`. Return None if spec is byte, char or bpe:VOCAB. Independent."""
    return None if spec in ("byte", "char") or spec.startswith("bpe:") else load_tokenizer(spec, eod)


@dataclass(frozen=True)
class Corpus:
    """The files of one source, and how to read them."""

    files: list[SourceFile]
    own_files: list[SourceFile]  # files of this rank
    reader: SourceReader

    def apart(self) -> Corpus:
        """Return the corpus with new counts. Use it to read files that are read again later, so that problems are not counted
        twice."""
        return replace(self, reader=replace(self.reader, counts=Counts()))


def make_tokenizer(spec: str, eod: str | None, corpora: list[Corpus], team: Team, ticker: Ticker) -> Tokenizer:
    """Return the tokenizer, which is the same on every rank. It is loaded if `spec` is a path, or made from the text of all
    corpora. Collective over the team.

    BPE is trained on rank 0, with at most BPE_TRAINING_CHARACTERS characters.
    """
    corpora = [corpus.apart() for corpus in corpora]
    characters: set[str] = set()
    stored: tuple[str, int | None] | None = None
    with team.raise_together():
        if spec == "char":
            for corpus in corpora:
                for f in corpus.own_files:
                    for text in corpus.reader.pieces(f):
                        characters.update(text or "")
        elif spec.startswith("bpe:") and team.rank == 0:
            trained = train_bpe(_training_text(corpora, ticker), int(spec[4:]))
            stored = trained.to_json(), trained.eod
        elif team.rank == 0 and (given := given_tokenizer(spec, eod)) is not None:
            stored = given.to_json(), given.eod
    if spec == "byte":
        return ByteTokenizer()
    if spec == "char":
        characters = set().union(*team.allgather(characters))
        if not characters:
            raise DataError(Counts.total(team.allgather([corpus.reader.counts for corpus in corpora])).no_text())
        return CharTokenizer("".join(sorted(characters)))
    text, eod_id = team.bcast(stored)
    return tokenizer_from_json(text, eod_id)


def _training_text(corpora: list[Corpus], ticker: Ticker) -> Iterator[str]:
    files = [(f, corpus.reader) for corpus in corpora for f in corpus.files]
    left = BPE_TRAINING_CHARACTERS
    for f, reader in sorted(files, key=lambda pair: blake2b(pair[0].name.encode("utf-8", "surrogateescape")).digest()):
        for text in reader.pieces(f) if left > 0 else ():
            if left <= 0:
                break
            if text is not None:
                left -= len(text)
                yield text
    if (used := BPE_TRAINING_CHARACTERS - left) >= SLOW_CHARACTERS:
        ticker.say(f"training the tokenizer on {used / MEGABYTE:,.0f} MB of text")

"""What --source says: places of text, each with its weight in the mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.arrange import Laid
from data_tools.cut import Stream
from mpidp.errors import DataError, UsageError


@dataclass(frozen=True)
class Source:
    """A file, a folder or "stdlib", and its share of the tokens."""

    path: str
    share: float


def parse_sources(words: str | Sequence[str]) -> list[Source]:
    """PATH, or several of PATH:WEIGHT, weights being relative to each other. UsageError. Independent."""
    words = [words] if isinstance(words, str) else list(words)
    found = [_parse(word) for word in words]
    if not found:
        raise UsageError("--source names nothing; give a file or a folder")
    if len(found) > 1 and any(weight is None for _, weight in found):
        said = " --source ".join(["", *words]).strip()
        raise UsageError(f"{said}: a mixture needs the weight of each, as in --source A:0.7 --source B:0.3")
    weights = [1.0 if weight is None else weight for _, weight in found]
    for word, weight in zip(words, weights, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise UsageError(f"--source {word}: the weight must be a number above 0")
    if len({path for path, _ in found}) < len(found):
        raise UsageError(f"--source {' --source '.join(words)} names a source twice; give it the sum of the weights")
    return [Source(path, weight / sum(weights)) for (path, _), weight in zip(found, weights, strict=True)]


def _parse(word: str) -> tuple[str, float | None]:
    path, colon, weight = word.rpartition(":")
    if not colon or not path or Path(word).exists():
        return word, None
    try:
        return path, float(weight)
    except ValueError:
        return word, None


def lay_out(
    split: str, streams: list[Stream], sources: list[Source], tokens: int, repeat: bool, window: int, eod: int
) -> tuple[Laid, list[tuple[int, int]]]:
    """A split's documents in order, and (documents, tokens) that each source gave. A source of which validation drew no document
    is left out of it. DataError for one that has none at all. Independent."""
    held = [s for s, stream in enumerate(streams) if stream.tokens]
    if split == "train" and len(held) < len(streams):
        empty = next(s for s in range(len(streams)) if s not in held)
        raise DataError(f"the source {sources[empty].path} has no document to train on; mend it, or leave it out")
    laid = Laid.of([streams[s] for s in held], [sources[s].share for s in held], tokens, repeat, window, eod)
    given = dict(zip(held, laid.taken(), strict=True))
    return laid, [given.get(s, (0, 0)) for s in range(len(streams))]


def shares(sources: list[Source], given: list[tuple[int, int]], there: list[int]) -> list[dict[str, Any]]:
    """What index.json says of a mixture: of each source the share asked for, and what was taken of its documents. Pure."""
    total = max(1, sum(tokens for _, tokens in given))
    return [
        {"asked": round(source.share, 6), "got": round(tokens / total, 6), "tokens": tokens, "documents": documents,
         "of_documents": have}
        for source, (documents, tokens), have in zip(sources, given, there, strict=True)
    ]


def in_words(sources: list[Source], told: list[dict[str, Any]]) -> list[str]:
    """Lines for people; none where nothing was told. Pure."""
    return [
        f"{source.path}: {one['asked']:.1%} asked, {one['got']:.1%} got: {one['tokens']:,} tokens, {one['documents']:,} documents"
        f"{', which are all' * (one['documents'] == one['of_documents'])}"
        f"{', {:.1f} times round'.format(one['documents'] / one['of_documents']) * (one['documents'] > one['of_documents'])}"
        for source, one in zip(sources if told else [], told, strict=True)
    ]

"""Parses --source: one or more sources of text, each with its weight in the mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.arrange import Arrangement
from data_tools.cut import Stream
from mpidp.errors import DataError, UsageError
from mpidp.runtime.log import counted
from mpidp.storage.address import check_local


@dataclass(frozen=True)
class Source:
    """A source of text. `path`: a file, a folder or "stdlib". `share`: the fraction of the mixture's tokens that should come
    from this source."""

    path: str
    share: float


def parse_sources(specs: str | Sequence[str]) -> list[Source]:
    """Parse one PATH, or several PATH:WEIGHT. Only the ratios of the weights matter. Raises UsageError if a weight or path is
    invalid. Independent."""
    specs = [specs] if isinstance(specs, str) else list(specs)
    for spec in specs:
        check_local("--source", spec)
    found = [_parse(spec) for spec in specs]
    if not found:
        raise UsageError("--source is empty; give a file or a folder")
    if len(found) > 1 and any(weight is None for _, weight in found):
        given = " --source ".join(["", *specs]).strip()
        raise UsageError(f"{given}: a mixture needs a weight for each source, as in --source A:0.7 --source B:0.3")
    weights = [1.0 if weight is None else weight for _, weight in found]
    for spec, weight in zip(specs, weights, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise UsageError(f"--source {spec}: the weight must be a number above 0")
    if len({path for path, _ in found}) < len(found):
        raise UsageError(f"--source {' --source '.join(specs)} names a source twice. Name it once with the sum of its weights")
    return [Source(path, weight / math.fsum(weights)) for (path, _), weight in zip(found, weights, strict=True)]


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
) -> tuple[Arrangement, list[tuple[int, int]]]:
    """Arrange the documents of one split as Arrangement.of() does. Return (arrangement, taken). taken: for each source, a pair
    (number of documents taken, number of tokens taken). `streams`: the tokens of each of the `sources` in this split.

    A source without documents in the split "val" is left out of that split. Raises DataError if a source has no training
    documents. Independent.
    """
    used = [s for s, stream in enumerate(streams) if stream.tokens]
    if split == "train" and len(used) < len(streams):
        empty = next(s for s in range(len(streams)) if s not in used)
        raise DataError(f"the source {sources[empty].path} has no document to train on. Correct this source, or leave it out")
    arranged = Arrangement.of([streams[s] for s in used], [sources[s].share for s in used], tokens, repeat, window, eod)
    taken = dict(zip(used, arranged.taken(), strict=True))
    return arranged, [taken.get(s, (0, 0)) for s in range(len(streams))]


def mixture_record(sources: list[Source], taken: list[tuple[int, int]], available: list[int]) -> list[dict[str, Any]]:
    """Return the record of a mixture for index.json, one dict per source. `taken`: for each source, (documents, tokens) as in
    lay_out(), summed over the splits. `available`: the number of documents of each source. Pure."""
    total = max(1, sum(tokens for _, tokens in taken))
    return [
        {"asked": round(source.share, 6), "got": round(tokens / total, 6), "tokens": tokens, "documents": documents,
         "of_documents": have}
        for source, (documents, tokens), have in zip(sources, taken, available, strict=True)
    ]


def mixture_lines(sources: list[Source], records: list[dict[str, Any]]) -> list[str]:
    """Return one line of text per source of a mixture, or [] if `records` is empty. `records`: see mixture_record(). Pure."""
    return [
        f"{source.path}: {one['asked']:.1%} requested, {one['got']:.1%} taken: {counted(one['tokens'], 'token')}, "
        f"{counted(one['documents'], 'document')}{' (all)' * (one['documents'] == one['of_documents'])}"
        f"{' ({:.1f} passes)'.format(one['documents'] / one['of_documents']) * (one['documents'] > one['of_documents'])}"
        for source, one in zip(sources if records else [], records, strict=True)
    ]

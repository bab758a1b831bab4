"""Laws of cost: reading and generating take time in proportion to their text, and prepare's memory does not grow with it."""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.prepare import prepare
from mpidp.data.records import records
from mpidp.data.text_files import recognize
from mpidp.inference.speech import StreamedText
from mpidp.inference.stop_strings import StopStrings

FACTOR = 8  # a text is this many times as long as another; a quadratic cost is 64 times as high


def steps(work: Callable[[], object]) -> int:
    """Return the number of lines of Python that are executed. Unlike time, it does not depend on the machine."""
    found, before = 0, sys.gettrace()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal found
        found += event == "line"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return found


class Same:
    """A detokenizer in which each token is one character."""

    def add(self, token: int) -> str:
        return chr(token)

    def end(self) -> str:
        return ""


@pytest.mark.parametrize(("stop", "text"), [("a{}b", "a"), ("ab{}c", "ab"), ("x{}y", "a")])
def test_the_cost_of_stop_strings_is_proportional_to_text_and_strings(stop: str, text: str) -> None:
    """Long strings that nearly occur are the worst case: all of the text is held back."""
    def generate(length: int) -> None:
        stream = StreamedText(Same(), [stop.format(text * length), "\n\n"])
        for character in text * length:
            assert not stream.add(ord(character))
        assert stream.end() == text * length

    few, many = (steps(lambda n=n: generate(n)) for n in (50, 50 * FACTOR))  # type: ignore[misc]
    assert many < 1.5 * FACTOR * few


@pytest.mark.parametrize("stops", [["aab", "abaa", "b"], ["aaaa"], ["abab", "babb", "bb"], ["c", "aabab"]], ids=str)
def test_stop_strings_are_found_as_in_the_whole_text(stops: list[str]) -> None:
    """All texts of ten letters a and b, in pieces of one to three letters."""
    for number in range(2**10):
        text, search, certain, stopped = f"{number:010b}".replace("0", "a").replace("1", "b"), StopStrings(stops), "", False
        given, size = 0, 1 + number % 3
        while given < len(text) and not stopped:
            piece, given = text[given : given + size], given + size
            said, stopped = search.add(piece)
            certain += said
            held = text[len(certain) : given]
            assert stopped or held == "" or any(stop.startswith(held) for stop in stops)
        seen = text[:given]
        starts = [at for stop in stops if (at := seen.find(stop)) >= 0]
        assert stopped == bool(starts) and certain + ("" if stopped else search.rest()) == seen[: min(starts, default=given)]


@pytest.mark.parametrize("packed", [False, True], ids=["jsonl", "jsonl.zst"])
def test_the_cost_of_a_line_is_proportional_to_its_length(packed: bool, tmp_path: Path) -> None:
    """The ratio of two times, each the least of three, with much room: 8 for a linear cost, 64 for a quadratic cost."""
    def seconds(size: int) -> float:
        path, spent = tmp_path / f"long.jsonl{'.zst' * packed}", []
        data = json.dumps({"text": "some words, " * (size // 12)}).encode()
        path.write_bytes(pytest.importorskip("zstandard").compress(data) if packed else data)
        for _ in range(3):
            before = time.process_time()
            (row,) = records(recognize(path))
            spent.append(time.process_time() - before)
            assert row.fields is not None and len(row.fields["text"]) == size // 12 * 12
        return min(spent)

    assert seconds(2**21 * FACTOR) < 4 * FACTOR * seconds(2**21)


def test_the_memory_of_prepare_does_not_grow_with_a_document(tmp_path: Path) -> None:
    def peak(size: int) -> int:
        (tmp_path / "long.txt").write_text("a text without an end, \U0001f642 " * (size // 25))
        tracemalloc.start()
        try:
            prepare(str(tmp_path / "long.txt"), "byte", tmp_path / "out", shards=1, verbose=False)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(2**21 * FACTOR) < 1.3 * peak(2**21)

"""Laws of mixtures: every prefix has about the requested shares, documents stay whole, and the shares reached are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.arrange import mix
from data_tools.mixture import Source, parse_sources
from data_tools.prepare import prepare
from mpidp.data.shards import TokenStream
from mpidp.errors import DataError, UsageError
from tests.unit.test_prepare import documents, write_lines


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a.jsonl: 400 documents of the letter a; b.jsonl: 60 longer ones of b; c/: two files."""
    monkeypatch.chdir(tmp_path)
    write_lines(Path("a.jsonl"), ["a" * (1 + i * i % 37) for i in range(400)])
    write_lines(Path("b.jsonl"), ["b" * (30 + i * i % 53) for i in range(60)])
    Path("c").mkdir()
    for name in "xy":
        Path(f"c/{name}.txt").write_text("c" * 50)


def tokens_of(texts: list[str]) -> dict[str, int]:
    """Count tokens by the letter of the source, including EOD."""
    return {letter: sum(len(t) + 1 for t in texts if t[0] == letter) for letter in "abc"}


def test_any_beginning_has_the_shares(sources: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = prepare(["a.jsonl:7", "b.jsonl:3"], out="out", val_fraction=0, shards=3)
    found = documents(tmp_path / "out")
    for n in range(1, len(found)):
        got = tokens_of(found[:n])
        total = got["a"] + got["b"]
        assert abs(got["a"] - 0.7 * total) <= 0.7 * 83 and abs(got["b"] - 0.3 * total) <= 0.7 * 83
    for letter, path in (("a", "a.jsonl"), ("b", "b.jsonl")):  # each source in its own order
        prepare(path, out=f"alone_{letter}", val_fraction=0, verbose=False)
        mine = [text for text in found if text[0] == letter]
        assert mine == documents(tmp_path / f"alone_{letter}")[: len(mine)]
    assert set(map(tuple, index.source["sources"][0].items())) >= {("kind", "file"), ("name", "a.jsonl"), ("asked", 0.7)}
    got = tokens_of(found)
    assert [one["tokens"] for one in index.source["sources"]] == [got["a"], got["b"]]
    said = capsys.readouterr().out
    assert "a.jsonl: 70.0% requested, 70.0% taken" in said and "60 documents (all)" in said


def test_a_mixture_ends_when_a_source_has_run_out(sources: None, tmp_path: Path) -> None:
    prepare(["a.jsonl:1", "b.jsonl:9"], out="out", val_fraction=0)
    found = documents(tmp_path / "out")
    assert sum(text[0] == "b" for text in found) == 60 and tokens_of(found)["a"] == pytest.approx(sum(
        len(t) + 1 for t in found) / 10, abs=83)


def test_so_many_tokens_in_all(sources: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(["a.jsonl:0.5", "b.jsonl:0.5"], out="out", val_fraction=0, tokens=2000)
    assert 2000 <= TokenStream("out").num_tokens < 2000 + 83
    prepare("a.jsonl", out="one", val_fraction=0, tokens=100)
    prepare("a.jsonl", out="whole", val_fraction=0)
    one = documents(tmp_path / "one")
    assert 100 <= sum(len(t) + 1 for t in one) < 140 and one == documents(tmp_path / "whole")[: len(one)]
    prepare(["a.jsonl:1", "b.jsonl:9"], out="round", val_fraction=0, tokens=20000, repeat=True)
    found = documents(tmp_path / "round")
    bs = [text for text in found if text[0] == "b"]
    assert 20000 <= sum(len(t) + 1 for t in found) < 20083 and bs[60:120] == bs[:60] and len(bs) > 240
    assert "passes)" in capsys.readouterr().out


def test_validation_has_the_shares_too(sources: None, tmp_path: Path) -> None:
    """Whole documents of each source, drawn separately. A source without drawn documents is left out of validation only."""
    prepare(["a.jsonl:0.5", "b.jsonl:0.4", "c:0.1"], out="out", val_fraction=0.2, split="document", tokens=1000, repeat=True)
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert 800 <= sum(len(t) + 1 for t in train) < 900 and 200 <= sum(len(t) + 1 for t in val) < 300
    assert not set(train) & set(val) - {t for t in train if len(t) < 38} and {"a", "b"} <= {t[0] for t in val}
    prepare(["a.jsonl:0.5", "b.jsonl:0.5"], out="tail", val_fraction=0.2)
    ids = TokenStream("tail", "val").read(0, 1300)
    assert (ids == ord("a")).sum() == pytest.approx((ids == ord("b")).sum(), abs=2 * 83)


def test_no_document_is_in_both_splits_of_a_repeated_mixture(sources: None, tmp_path: Path) -> None:
    write_lines(Path("u.jsonl"), [f"document {i} of u" for i in range(200)])
    write_lines(Path("v.jsonl"), [f"document {i} of v" for i in range(50)])
    prepare(["u.jsonl:1", "v.jsonl:1"], out="out", val_fraction=0.1, tokens=20000, repeat=True)
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert len(train) > 2 * len(set(train)) and val and not set(train) & set(val)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.floats(0.01, 1)), min_size=1, max_size=4),
       st.integers(0, 3000), st.booleans())
def test_no_source_is_ahead_of_another_by_more_than_a_document(
    given_sources: list[tuple[list[int], float]], tokens: int, repeat: bool
) -> None:
    lengths, weights = [np.array(one) for one, _ in given_sources], [weight for _, weight in given_sources]
    which, numbers = mix(lengths, weights, tokens, repeat and tokens > 0)
    got, taken = [0.0] * len(lengths), [0] * len(lengths)
    for source, number in zip(which.tolist(), numbers.tolist(), strict=True):
        assert number == taken[source] % len(lengths[source])
        assert got[source] <= min(got) + 1e-9
        got[source] += lengths[source][number] / weights[source]
        taken[source] += 1
    total = sum(int(lengths[s][n]) for s, n in zip(which.tolist(), numbers.tolist(), strict=True))
    assert not tokens or total - (lengths[which[-1]][numbers[-1]] if len(which) else 0) < tokens
    assert not (tokens and repeat) or total >= tokens


@pytest.mark.parametrize(("words", "found"), [
    ("x", [Source("x", 1.0)]), (["a:3", "b:1"], [Source("a", 0.75), Source("b", 0.25)]), ("c:\\text", [Source("c:\\text", 1.0)]),
    (["s3:x:0.5", "b:0.5"], [Source("s3:x", 0.5), Source("b", 0.5)]), (":3", [Source(":3", 1.0)]), ("a:5", [Source("a", 1.0)]),
])  # fmt: skip
def test_sources_are_read(words: Any, found: list[Source]) -> None:
    assert parse_sources(words) == found


def test_a_name_with_a_colon_is_a_name(sources: None) -> None:
    Path("odd:5").write_text("x")
    assert parse_sources("odd:5") == [Source("odd:5", 1.0)]


@pytest.mark.parametrize(("words", "error", "said"), [
    (["a.jsonl", "b.jsonl:0.5"], UsageError, "needs a weight for each"), (["a.jsonl:0", "b.jsonl:1"], UsageError, "above 0"),
    (["a.jsonl:nan", "b.jsonl:1"], UsageError, "above 0"), (["a.jsonl:1", "a.jsonl:1"], UsageError, "names a source twice"),
    ([], UsageError, "--source is empty"), (["a.jsonl:1", "gone:1"], DataError, "gone"),
    (["a.jsonl:1", "blank:1"], DataError, "the source blank has no document to train on"),
])  # fmt: skip
def test_mixtures_that_cannot_be(sources: None, words: list[str], error: type, said: str) -> None:
    Path("blank").mkdir()
    Path("blank/x.jsonl").write_text("\n\n")
    with pytest.raises(error, match=said):
        prepare(words, out="out")
    assert not Path("out").exists()

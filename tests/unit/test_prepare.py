"""Laws of preparation: every text can be restored from the shards, old shards are safe, and bad input is counted or rejected."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.files import find_files
from data_tools.mixture import Source
from data_tools.options import PrepareOptions, check_options
from data_tools.prepare import prepare
from mpidp.data.shards import TokenStream
from mpidp.data.token_bytes import bytes_of_tokens
from mpidp.data.tokenizer import load_tokenizer, train_bpe
from mpidp.errors import DataError, UsageError

TEXTS = {"b.txt": "Shall I compare thee\nto a summer's day?\n" * 40, "a/c.md": "# ünïcödé 漢字 🙂\r\n" * 30,
         "z.py": "x = 1\n" * 50, "noext": "plain <|endoftext|> text"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def documents(out: Path, *splits: str) -> list[str]:
    """Return every document of the shards, decoded; check the document offsets."""
    tokenizer, found = load_tokenizer(out), []
    for split in splits or ("train",):
        stream = TokenStream(out, split)
        stream.check(contents=True)
        ids = stream.read(0, stream.num_tokens).astype(np.int64)
        ends = np.flatnonzero(ids == stream.eod)
        found += [tokenizer.decode(part) for part in np.split(ids, ends + 1) if len(part)]
        starts, at = [], 0
        for i, record in enumerate(stream.files):
            starts += (stream.doc_offsets(i).astype(np.int64) + at).tolist()
            at += record.tokens
        whole = split == "train" or splits == ("val",)  # a document that validation divides begins in training
        assert starts == ([0, *(ends + 1)][: len(starts)] if whole else starts)
        assert stream.num_documents == len(starts)
        of = bytes_of_tokens(tokenizer)
        assert of is not None and of.count(ids, np.isin(np.arange(len(ids)), starts)).sum() == stream.text_bytes
    return found


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe:300"])
@pytest.mark.parametrize("shards", [1, 7])
def test_every_text_comes_back_in_order(corpus: Path, tmp_path: Path, tokenizer: str, shards: int) -> None:
    index = prepare(str(corpus), tokenizer, tmp_path / "out", shards, val_fraction=0)
    assert documents(tmp_path / "out") == [TEXTS[name] for name in ("a/c.md", "b.txt", "noext", "z.py")]
    stream = TokenStream(tmp_path / "out")
    sizes = [record.tokens for record in stream.files]
    assert len(sizes) == shards and max(sizes) - min(sizes) <= 1
    assert index.to_json().encode() == (tmp_path / "out/index.json").read_bytes()
    assert stream.text_bytes == sum(len(text.encode()) for text in TEXTS.values())
    assert stream.num_documents == 4 and stream.tokenizer_sha256 == index.tokenizer_sha256
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"index.json", "tokenizer.json", *(f"train_{i:05d}.h5" for i in range(shards))}


def test_the_end_of_the_stream_is_validation(corpus: Path, tmp_path: Path) -> None:
    prepare(str(corpus), out=tmp_path / "whole", val_fraction=0)
    prepare(str(corpus), out=tmp_path / "split", val_fraction=0.25, shards=8)
    whole = TokenStream(tmp_path / "whole")
    train, val = (TokenStream(tmp_path / "split", split) for split in ("train", "val"))
    assert val.num_tokens == round(0.25 * whole.num_tokens) and len(val.files) == round(8 / 3)
    both = np.concatenate([s.read(0, s.num_tokens) for s in (train, val)])
    np.testing.assert_array_equal(both, whole.read(0, whole.num_tokens))
    assert train.num_documents + val.num_documents == 4 and train.text_bytes + val.text_bytes == whole.text_bytes


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_whole_documents_are_drawn_for_validation(tmp_path: Path) -> None:
    texts = [f"document {i} " * (i % 5 + 1) for i in range(1000)]
    write_lines(tmp_path / "a.jsonl", texts)

    def split(name: str, seed: int) -> tuple[list[str], list[str]]:
        prepare(str(tmp_path / "a.jsonl"), out=tmp_path / name, val_fraction=0.2, split="document", seed=seed)
        return documents(tmp_path / name, "train"), documents(tmp_path / name, "val")

    train, val = split("one", 1)
    assert sorted(train + val) == sorted(texts) and train == [t for t in texts if t in set(train)]
    assert 150 < len(val) < 250
    assert split("again", 1) == (train, val) and split("other", 2)[1] != val
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "folder")
    write_lines(tmp_path / "folder/0.jsonl", ["another file", "in front"] * 10)
    prepare(str(tmp_path / "folder"), out=tmp_path / "more", val_fraction=0.2, split="document", seed=1)
    assert set(val) <= set(documents(tmp_path / "more", "val"))  # other files do not change the draws


def test_a_damaged_source_leaves_the_old_shards(tmp_path: Path) -> None:
    path, out = tmp_path / "a.jsonl.gz", tmp_path / "out"
    path.write_bytes(gzip.compress(b'{"text": "fine"}\n' * 100))
    prepare(str(path), out=out, val_fraction=0)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="a.jsonl.gz"):
        prepare(str(path), out=out, val_fraction=0)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_malformed_lines_are_shown_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + "{\n" * 7 + '{"text": "last"}')
    index = prepare(str(path), out=tmp_path / "out", val_fraction=0, shards=1)
    assert documents(tmp_path / "out") == ["fine", "last"] and index.source["malformed"] == 7
    said = capsys.readouterr().out
    assert "7 malformed" in said and "a.jsonl:2" in said and "a.jsonl:6" in said and "a.jsonl:7" not in said
    with pytest.raises(DataError, match=r"a\.jsonl:2.*--strict"):
        prepare(str(path), out=tmp_path / "out", strict=True)


def test_text_that_is_not_utf8_is_replaced_or_skipped(corpus: Path, tmp_path: Path) -> None:
    (corpus / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (corpus / "lines.jsonl").write_bytes(b'{"text": "\\ud800 lone"}\n{"text": "ra\xffw"}\n{"text": "good"}\n')
    index = prepare(str(corpus), out=tmp_path / "a", val_fraction=0)
    found = documents(tmp_path / "a")
    assert index.source["bad_utf8"] == 3 and "caf\ufffd" in found and "ra\ufffdw" in found
    assert any(text.endswith(" lone") for text in found)
    index = prepare(str(corpus), out=tmp_path / "a", val_fraction=0, bad_utf8="skip")
    assert index.source["bad_utf8"] == 3 and documents(tmp_path / "a") == [
        TEXTS["a/c.md"], TEXTS["b.txt"], "good", TEXTS["noext"], TEXTS["z.py"]]


def test_what_is_not_text_is_left_out_and_counted(corpus: Path, tmp_path: Path) -> None:
    (corpus / "empty.txt").touch()
    (corpus / "image.bin").write_bytes(b"\x89PNG\0\0")
    (corpus / ".git").mkdir()
    (corpus / ".git/config").write_text("hidden")
    (corpus / ".hidden").write_text("hidden")
    index = prepare(str(corpus), out=corpus / "out", val_fraction=0)
    again = prepare(str(corpus), out=corpus / "out", val_fraction=0)  # its own output is not used as a source
    assert index == again and (index.source["empty"], index.source["binary"], index.source["files"]) == (1, 1, 6)
    assert len(documents(corpus / "out")) == 4


def test_sources_that_cannot_be_read_are_refused_by_name(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "nul.txt").write_bytes(b"a\0b")
    (tmp_path / "nothing.txt").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    for source, words in [("missing", "missing.*No such file"), ("empty", "empty.*no files"), ("nul.txt", "nul.txt.*binary"),
                          ("nothing.txt", "nothing.txt is empty"), ("blank.jsonl", "no text at all")]:
        for tokenizer in ("byte", "char"):
            with pytest.raises(DataError, match=words if tokenizer == "byte" else source.split(".")[0] + "|no text"):
                prepare(str(tmp_path / source), tokenizer, out=out)
    (corpus / "broken.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="broken.txt"):
        prepare(str(corpus), out=out)
    assert not out.exists()


def test_options_that_cannot_be_are_refused_before_anything_is_touched(corpus: Path, tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [
        {"shards": 0}, {"val_fraction": 1.0}, {"val_fraction": -0.1}, {"val_fraction": float("nan")}, {"split": "x"},
        {"bad_utf8": "x"}, {"tokenizer": "bite"}, {"tokenizer": "bpe"}, {"tokenizer": "bpe:x"}, {"tokenizer": "bpe:100"},
    ]
    for options in bad:
        with pytest.raises(UsageError):
            prepare(str(corpus), out=tmp_path / "out", **options)
    for tokenizer in ("byte", "char", "bpe:300"):
        with pytest.raises(UsageError, match=f"--eod x: --tokenizer {tokenizer} has an end-of-document token of its own. Omit"):
            prepare(str(corpus), tokenizer, tmp_path / "out", eod="x")
    with pytest.raises(UsageError, match="--shards 5000"):
        prepare(str(corpus), out=tmp_path / "out", shards=5000)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not a folder"):
        prepare(str(corpus), out=tmp_path / "file")
    assert not (tmp_path / "out").exists()
    check_options(PrepareOptions([Source("x", 1.0)], "bpe:257", 1, 0.0, bad_utf8="skip"))


def test_a_corpus_too_small_to_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    prepare(str(tmp_path / "a.txt"), out=tmp_path / "out", val_fraction=0, shards=1)
    assert TokenStream(tmp_path / "out").num_tokens == 2
    with pytest.raises(DataError, match="--val-fraction 0"):
        prepare(str(tmp_path / "a.txt"), out=tmp_path / "out", shards=1)
    (tmp_path / "a.txt").write_text("abc")
    index = prepare(str(tmp_path / "a.txt"), out=tmp_path / "out", val_fraction=0.05, shards=1)
    assert index.splits["train"].tokens == 2 and index.splits["val"].tokens == 2
    with pytest.raises(DataError, match="--split text"):
        prepare(str(tmp_path / "a.txt"), out=tmp_path / "out", val_fraction=0.05, shards=1, split="document")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for options in ({"form": "prompt_completion", "seq_len": 8}, {"text_key": "prompt", "tokens": 9, "repeat": True}):
        with pytest.raises(DataError, match="Give more text, or set --val-fraction 0, or give another --seed$"):
            prepare(str(tmp_path / "a.jsonl"), out=tmp_path / "out", val_fraction=0.05, shards=1, **options)


def test_our_shards_are_replaced_and_stale_ones_removed(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(corpus), out=out, shards=6)
    (out / "notes.txt").write_text("mine")
    prepare(str(corpus), "char", out=out, shards=2, val_fraction=0)
    assert {p.name for p in out.iterdir()} == {"index.json", "tokenizer.json", "train_00000.h5", "train_00001.h5", "notes.txt"}
    TokenStream(out).check(contents=True)


def test_foreign_files_are_not_touched(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(corpus), out=out)
    (out / "mine.h5").write_text("precious")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(UsageError, match="mine.h5.*Nothing was changed"):
        prepare(str(corpus), out=out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (out / "mine.h5").unlink()
    (out / "index.json").write_text('{"my": "index"}')
    with pytest.raises(UsageError, match="Choose another folder"):
        prepare(str(corpus), out=out)


@pytest.mark.parametrize("stop_at", range(1, 18))
def test_a_run_killed_while_it_replaces_shards_is_made_good_by_the_next(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """At any moment there is the old set, the new set, or no index; preparing again always works."""
    out = tmp_path / "out"
    prepare(str(corpus), out=out, shards=3)
    old = (out / "index.json").read_bytes()
    moves, real = 0, os.replace

    def replace(a: Any, b: Any) -> None:
        nonlocal moves
        moves += 1
        if moves == stop_at:
            raise KeyboardInterrupt
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace)
        try:
            prepare(str(corpus), "char", out=out, shards=4)
        except KeyboardInterrupt:
            assert stop_at <= 16
            if (out / "index.json").exists():
                assert (out / "index.json").read_bytes() == old
                TokenStream(out).check(contents=True)
        else:
            assert stop_at == 17
    prepare(str(corpus), out=out, shards=2)
    TokenStream(out).check(contents=True)
    assert len(list(out.glob("*.h5"))) == 3 and not (out / ".prepare").exists()


def test_a_given_tokenizer_is_stored_as_it_is(corpus: Path, tmp_path: Path) -> None:
    text = train_bpe(iter(TEXTS.values()), 290).to_json().replace("<|endoftext|>", "<stop>") + "\n"
    (tmp_path / "given.json").write_text(text)
    with pytest.raises(DataError, match="--eod"):
        prepare(str(corpus), str(tmp_path / "given.json"), tmp_path / "out")
    prepare(str(corpus), str(tmp_path / "given.json"), tmp_path / "out", eod="<stop>", val_fraction=0)
    assert (tmp_path / "out/tokenizer.json").read_text() == text and len(documents(tmp_path / "out")) == 4
    prepare(str(corpus), str(tmp_path / "out"), tmp_path / "second", val_fraction=0)  # the folder of shards defines its eod
    assert (tmp_path / "second/train_00000.h5").read_bytes() == (tmp_path / "out/train_00000.h5").read_bytes()


def test_the_sizes_of_pieces_change_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(str(corpus), out=tmp_path / "whole")
    monkeypatch.setattr("data_tools.sources.PIECE_BYTES", 100)
    monkeypatch.setattr("data_tools.encode.BATCH_CHARACTERS", 10)
    monkeypatch.setattr("data_tools.cut.PIECE_TOKENS", 77)
    prepare(str(corpus), out=tmp_path / "pieces")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "pieces" / path.name).read_bytes()


def test_the_standard_library_is_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = prepare(out=tmp_path / "out")
    assert set(index.splits) == {"train", "val"} and index.splits["train"].tokens > 5_000_000
    assert index.source["kind"] == "stdlib" and len(index.source["sha256"]) == 64 and index.source["python"].startswith("3.")
    files, _, _ = find_files("stdlib", tmp_path)
    assert all(f.name.endswith(".py") for f in files)
    assert not {"site-packages", "dist-packages", "test", "tests"} & {part for f in files for part in f.name.split("/")}
    assert "bytes per token" in capsys.readouterr().out

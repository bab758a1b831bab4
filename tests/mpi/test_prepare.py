"""Law: any number of ranks prepares identical shards, and an error on one rank is raised on all ranks."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from data_tools.prepare import prepare
from mpidp.errors import DataError, MpidpError, UsageError

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """One folder for all ranks, with a corpus of files of very different sizes."""
    folder = Path(WORLD.bcast(str(tmp_path)))
    if WORLD.rank == 0:
        corpus = folder / "corpus"
        corpus.mkdir()
        for i in range(20):
            (corpus / f"text{i:02d}.txt").write_text(f"Text number {i}, ünïcödé 漢字.\n" * (i**3 % 97 + 1))
        (corpus / "a.jsonl").write_text("".join(json.dumps({"text": f"line {i} " * (i % 7)}) + "\n" for i in range(300)) + "{")
        (corpus / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n' * 50))
        (corpus / "bad.txt").write_bytes(b"caf\xe9 " * 10)
        (corpus / "empty.txt").touch()
    WORLD.Barrier()
    return folder


@pytest.fixture
def teams() -> Iterator[list[tuple[int, Any]]]:
    """Return communicators of the first 1, 2, ... ranks. On other ranks they are MPI.COMM_NULL."""
    made = [(n, WORLD.Split(0 if n > WORLD.rank else MPI.UNDEFINED, WORLD.rank)) for n in range(1, WORLD.size + 1)]
    yield made
    for _, comm in made:
        if comm != MPI.COMM_NULL:
            comm.Free()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


OPTIONS: list[dict[str, Any]] = [
    {"tokenizer": "byte"}, {"tokenizer": "char", "shards": 7}, {"tokenizer": "bpe:300", "shards": 1},
    {"tokenizer": "byte", "split": "document", "val_fraction": 0.3, "bad_utf8": "skip"},
]
MIXED: list[dict[str, Any]] = [
    {"tokens": 9000, "repeat": True, "shards": 3}, {"form": "prompt_completion", "seq_len": 40, "tokenizer": "bpe:300"},
    {"form": "chat", "seq_len": 48, "chat_template": "{% for m in messages %}{{ m.role[0] + ':' + m.content + ';' }}{% endfor %}"
     "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}", "truncate": True, "val_fraction": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_number_of_ranks_changes_no_byte(shared: Path, teams: list[tuple[int, Any]], options: dict[str, Any]) -> None:
    source = str(shared / "corpus")
    if WORLD.rank == 0:
        prepare(source, out=shared / "alone", verbose=False, **options)
    for n, comm in teams:
        if comm != MPI.COMM_NULL:
            index = prepare(source, out=shared / f"of{n}", comm=comm, verbose=False, **options)
            assert (shared / f"of{n}/index.json").read_text() == index.to_json()
    WORLD.Barrier()
    expected = contents(shared / "alone")
    for n, _ in teams:
        assert contents(shared / f"of{n}") == expected


def refused(kind: type[MpidpError], source: Path, out: Path, **options: Any) -> str:
    """Assert that every rank gets the same error and OUT is unchanged."""
    WORLD.Barrier()
    before = contents(out) if out.exists() else None
    WORLD.Barrier()
    with pytest.raises(kind) as caught:
        prepare(str(source), out=out, comm=WORLD, verbose=False, **options)
    WORLD.Barrier()
    assert (contents(out) if out.exists() else None) == before
    assert set(WORLD.allgather(str(caught.value))) == {str(caught.value)}
    return str(caught.value)


def test_an_error_on_one_rank_is_one_on_all(shared: Path) -> None:
    corpus, out = shared / "corpus", shared / "out"
    assert "a.jsonl:301" in refused(DataError, corpus, out, strict=True)
    prepare(str(corpus), out=out, comm=WORLD, verbose=False)
    if WORLD.rank == 0:
        (corpus / "zz.jsonl.gz").write_bytes(b"not gzip" * 2000)  # read by the last rank
    assert "zz.jsonl.gz" in refused(DataError, corpus, out)
    assert "missing" in refused(DataError, shared / "missing", out)
    assert "--shards" in refused(UsageError, corpus, out, shards=0)
    WORLD.Barrier()
    if WORLD.rank == 0:
        (corpus / "zz.jsonl.gz").unlink()
        (out / "foreign.h5").touch()
    assert "foreign.h5" in refused(UsageError, corpus, out)


def test_more_ranks_than_files(shared: Path) -> None:
    source = shared / "corpus/text05.txt"
    if WORLD.rank == 0:
        prepare(str(source), out=shared / "alone", verbose=False, shards=2)
    prepare(str(source), out=shared / "all", verbose=False, shards=2, comm=WORLD)
    WORLD.Barrier()
    assert contents(shared / "alone") == contents(shared / "all")


@pytest.mark.parametrize("options", MIXED, ids=["text", "prompt_completion", "chat"])
def test_the_number_of_ranks_changes_no_byte_of_rows_and_mixtures(
    shared: Path, teams: list[tuple[int, Any]], options: dict[str, Any]
) -> None:
    """Each source has several files, so that each rank reads some files of each source."""
    form, more = options.get("form", "text"), dict(options)
    if "chat_template" in more:
        more["chat_template"] = str(shared / "t.jinja")
    if WORLD.rank == 0:
        (shared / "t.jinja").write_text(options.get("chat_template", ""))
        for source, count in (("one", 40), ("two", 15)):
            (shared / source).mkdir()
            for i in range(5):
                rows = [f"{source} {i} {k} " * (k % 4) for k in range(count + 7 * i)]
                lines = [{"text": row} if form == "text" else {"prompt": row, "completion": f"{row[:9]}!"} for row in rows]
                if form == "chat":
                    said = [[("user", row), ("assistant", row[:9])] for row in rows]
                    lines = [{"messages": [{"role": r, "content": c} for r, c in turns]} for turns in said]
                (shared / source / f"{i}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    WORLD.Barrier()
    sources = [f"{shared}/one:0.6", f"{shared}/two:0.4"]
    for n, comm in teams:
        if comm != MPI.COMM_NULL:
            prepare(sources, out=shared / f"at{n}", verbose=False, comm=comm if n > 1 else None, **more)
    WORLD.Barrier()
    for n, _ in teams:
        assert contents(shared / f"at{n}") == contents(shared / "at1"), f"{n} ranks"


def test_a_template_that_is_missing_is_told_by_all(shared: Path) -> None:
    with pytest.raises(UsageError, match="--chat-template FILE"):
        prepare(str(shared / "corpus/a.jsonl"), out=shared / "none", form="chat", seq_len=8, comm=WORLD)
    with pytest.raises(DataError, match="no text at all"):
        prepare(str(shared / "corpus/a.jsonl"), out=shared / "none", form="prompt_completion", seq_len=8, comm=WORLD)

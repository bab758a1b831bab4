"""Laws of checkpoints on disk: every element is stored once, any damage is detected, an older checkpoint is used instead, and
unfinished ones are ignored."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from mpidp.checkpoint import manifest
from mpidp.checkpoint.boxes import share_out
from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.manifest import check_file, committed, newest_valid, read_manifest
from mpidp.checkpoint.reader import Reader
from mpidp.errors import CheckpointError, MpidpError
from mpidp.runtime.files import write_file
from tests import saves

ALONE = MPI.COMM_SELF
SHAPES = st.dictionaries(st.text("abc/._", min_size=1, max_size=6),
                         st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=8)


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.integers(1, 12))
def test_the_ranks_share_out_every_row_once(shapes: dict[str, tuple[int, ...]], size: int) -> None:
    shares = [share_out(shapes, rank, size) for rank in range(size)]
    for name, shape in shapes.items():
        rows = shape[0] if shape else 1
        ranges = sorted(share[name] for share in shares if name in share)
        assert all(0 <= start < stop <= rows for start, stop in ranges)
        if torch.empty(shape).numel():
            assert [start for start, _ in ranges] == [0] + [stop for _, stop in ranges[:-1]] and ranges[-1][1] == rows


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 8))
def test_the_shares_are_about_even(rows: int, columns: int, size: int) -> None:
    written = [sum((b - a) * columns for a, b in share_out({"w": (rows, columns)}, r, size).values()) for r in range(size)]
    assert sum(written) == rows * columns and max(written) - min(written) <= 2 * columns


def entries(step: int) -> dict[str, Entry]:
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(step))
    return {
        "model/w": Entry(values),
        "model/gain": Entry(torch.arange(5.0) + step),
        "strategy/w/step": Entry(torch.tensor(float(step))),
        "strategy/empty": Entry(torch.zeros(0, 4)),
        "strategy/count": Entry(torch.tensor([2**62 + step, -1])),
        "strategy/alone": Entry(values[:4].clone(), "sharded"),
        "strategy/residual": Entry(values[:2].clone(), "additive"),
    }


META = {"position": {"step": 0, "val_loss": None}, "end": None, "words": "ü\n\u2028"}


def save(run: Path, step: int, keep: int = 10) -> Path:
    return saves.save(run, step, entries(step), META, ALONE, keep)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    for step in (10, 20):
        save(tmp_path, step)
    return tmp_path


def test_what_is_written_is_read(run: Path) -> None:
    path, reasons = newest_valid(run, ALONE)
    assert path == run / "checkpoints/step_00000020" and reasons == [] and (run / "latest").read_text() == path.name
    reader = Reader(path)
    assert {**reader.meta, **META} == reader.meta and reader.meta["step"] == 20
    assert sorted(reader) == sorted(entries(20)) and len(reader) == 7
    for name, entry in entries(20).items():
        assert reader[name].dtype == entry.tensor.dtype and reader[name].shape == entry.tensor.shape
        assert torch.equal(reader[name], entry.tensor), name
    assert set(reader.under("model/")) == {"w", "gain"}


def test_a_manifest_cut_at_any_byte_is_refused(run: Path) -> None:
    path = run / "checkpoints/step_00000020"
    whole = (path / "manifest.json").read_bytes()
    assert whole.endswith(b"}\n")
    for length in range(len(whole) - 1):  # only the last newline is redundant
        (path / "manifest.json").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="manifest.json"):
            read_manifest(path)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest.json"):
        read_manifest(path)


def test_a_manifest_with_any_flipped_bit_is_refused_or_says_the_same(run: Path) -> None:
    path = run / "checkpoints/step_00000020"
    whole, body = (path / "manifest.json").read_bytes(), read_manifest(path)
    content = whole.index(b"\n") + 1
    for place in range(len(whole)):
        for bit in range(8) if place < content else [place % 8]:
            (path / "manifest.json").write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with suppress(CheckpointError):
                assert read_manifest(path) == body and not content <= place < len(whole) - 2


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"crc32": 0, "body":\n}', '{"crc32": 0}', '"x"', "\n}"])
def test_what_is_no_manifest_is_refused(run: Path, text: str) -> None:
    (run / "checkpoints/step_00000020/manifest.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_manifest(run / "checkpoints/step_00000020")


def test_another_format_is_refused(run: Path) -> None:
    path = run / "checkpoints/step_00000020"
    body = read_manifest(path) | {"format": 1}
    (path / "manifest.json").write_bytes(manifest._seal(body))
    with pytest.raises(CheckpointError, match="format 1, but this version of mpidp reads format 2"):
        read_manifest(path)


def data_file(path: Path) -> tuple[Path, dict[str, object]]:
    record = read_manifest(path)["files"][0]
    return path / record["file"], record


def stands_in(run: Path, why: str) -> None:
    """Assert that the newest is passed over for the older one, with the reason."""
    path, reasons = newest_valid(run, ALONE)
    assert path == run / "checkpoints/step_00000010"
    assert len(reasons) == 1 and "step_00000020" in reasons[0] and why in reasons[0]


def test_a_data_file_cut_anywhere_is_seen(run: Path) -> None:
    path = run / "checkpoints/step_00000020"
    file, record = data_file(path)
    whole = file.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"has {length} bytes, but the manifest states {len(whole)}"):
            check_file(path, record)
        stands_in(run, "bytes")
    file.write_bytes(whole + b"\0")
    stands_in(run, "bytes")
    file.unlink()
    stands_in(run, "cannot be read")


def test_any_flipped_bit_of_a_data_file_is_seen(run: Path) -> None:
    path = run / "checkpoints/step_00000020"
    file, record = data_file(path)
    whole, rng = file.read_bytes(), random.Random(7)
    places = [rng.randrange(8 * len(whole)) for _ in range(150)] + [0, 8 * len(whole) - 1]
    for place in places:
        spoilt = bytearray(whole)
        spoilt[place // 8] ^= 1 << place % 8
        file.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match="the file is corrupted"):
            check_file(path, record)
    stands_in(run, "the file is corrupted")
    file.write_bytes(whole)
    check_file(path, record)


def test_a_spoilt_manifest_is_passed_over(run: Path) -> None:
    manifest = run / "checkpoints/step_00000020/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    stands_in(run, "manifest.json")


def test_none_that_is_valid_is_an_error_and_none_at_all_is_not(run: Path) -> None:
    for step in (10, 20):
        (run / f"checkpoints/step_{step:08d}/manifest.json").write_text("")
    with pytest.raises(CheckpointError, match=r"is valid.*step_00000020.*step_00000010.*resume=never") as caught:
        newest_valid(run, ALONE)
    assert caught.value.exit_code == 4 and caught.value.everywhere
    shutil.rmtree(run / "checkpoints")
    assert newest_valid(run, ALONE) == (None, [])


def test_the_word_latest_decides_nothing(run: Path) -> None:
    (run / "latest").write_text("step_00000010")
    assert newest_valid(run, ALONE)[0] == run / "checkpoints/step_00000020"
    (run / "latest").unlink()
    assert newest_valid(run, ALONE)[0] == run / "checkpoints/step_00000020"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 20, 30, 40, 100_000_000):
        save(tmp_path, step, keep=3)
        assert len(list((tmp_path / "checkpoints").iterdir())) <= 3
    assert [p.name for p in committed(tmp_path / "checkpoints")] == ["step_100000000", "step_00000040", "step_00000030"]


@pytest.mark.parametrize("keep", [1, 2])
def test_invalid_later_checkpoints_do_not_displace_the_newest_valid_one(tmp_path: Path, keep: int) -> None:
    """Three checkpoints are damaged, and the run has resumed from an earlier one. It now keeps fewer checkpoints than before."""
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    for step in (20, 30, 40):
        (tmp_path / f"checkpoints/step_{step:08d}/manifest.json").write_text("")
    path = save(tmp_path, 15, keep=keep)
    assert newest_valid(tmp_path, ALONE)[0] == path and (tmp_path / "latest").read_text() == path.name
    kept = [int(path.name[5:]) for path in committed(tmp_path / "checkpoints")]
    assert kept == [40, 30, 20, 15, 10][: 3 + keep]


def test_what_is_left_over_counts_for_nothing_and_is_cleared(run: Path) -> None:
    folder = run / "checkpoints"
    for name in (".writing_step_00000030", ".old_step_00000005", ".old_.old_step_00000006"):
        shutil.copytree(folder / "step_00000020", folder / name)
    (folder / "step_99").mkdir()  # not a name of a checkpoint
    (folder / "notes.txt").write_text("mine")
    assert [p.name for p in committed(folder)] == ["step_00000020", "step_00000010"]
    assert newest_valid(run, ALONE)[0] == folder / "step_00000020"
    save(run, 30)
    assert sorted(p.name for p in folder.iterdir()) == [
        "notes.txt", "step_00000010", "step_00000020", "step_00000030", "step_99",
    ]


def test_the_same_step_again_replaces(run: Path) -> None:
    path = run / "checkpoints/step_00000020"
    data_file(path)[0].write_bytes(b"")
    assert save(run, 20) == path and newest_valid(run, ALONE) == (path, [])
    assert not list((run / "checkpoints").glob(".*"))


def save_that_dies(run: Path, step: int, dies_at: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Simulate a power failure at the dies_at-th rename, removal or write. Return whether there were so many."""
    calls = 0

    def dying(real: Callable[..., Any], quietly: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= dies_at and quietly:
                return None
            if calls >= dies_at:
                raise OSError("the power went")
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying(os.rename))
        patch.setattr(manifest, "write_file", dying(write_file))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree, quietly=True))
        with suppress(MpidpError):
            save(run, step, keep=1)
    return calls >= dies_at


def always_one_valid(run: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dies_at = 1
    while True:
        shutil.rmtree(run, ignore_errors=True)
        save(run, 20)
        died = save_that_dies(run, step, dies_at, monkeypatch)
        path, _ = newest_valid(run, ALONE)
        assert path is not None, f"none is left when the power fails at operation {dies_at}"
        reader = Reader(path)
        assert torch.equal(reader["model/w"], entries(reader.meta["step"])["model/w"].tensor)
        if not died:
            break
        dies_at += 1
    assert dies_at > 5 and reader.meta["step"] == step


def test_a_save_that_dies_anywhere_leaves_a_valid_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_one_valid(tmp_path / "run", 30, monkeypatch)


def test_a_save_over_the_same_step_that_dies_leaves_a_valid_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_one_valid(tmp_path / "run", 20, monkeypatch)


def test_a_missing_piece_is_named(run: Path) -> None:
    path = run / "checkpoints/step_00000020"
    body = read_manifest(path)
    del body["files"][0]["pieces"]["model/w"]
    (path / "manifest.json").write_bytes(manifest._seal(body))
    with pytest.raises(CheckpointError, match="model/w is incomplete: the files hold 0 of 120 elements"):
        Reader(path)["model/w"]


def test_a_manifest_is_plain_json(run: Path) -> None:
    whole = json.loads((run / "checkpoints/step_00000020/manifest.json").read_text())
    assert set(whole) == {"crc32", "body"} and whole["body"]["tensors"]["model/w"] == {
        "shape": [40, 3], "dtype": "float32", "layout": "replicated",
    }


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "f", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_file(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    write_file(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["f"]

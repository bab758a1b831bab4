"""Laws of the shard format: a round trip restores the data, files have the same bytes each time, and hostile files are not
opened."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpidp.data.index import FileRecord, Index, SplitRecord
from mpidp.data.shard_writer import checksums, write_shard
from mpidp.data.shards import TokenStream
from mpidp.errors import DataError
from mpidp.runtime.files import most_open_files

LENGTHS = [1000, 3, 4096, 1]


def make_shards(folder: Path, lengths: list[int] = LENGTHS, vocab_size: int = 300, mask: bool = False) -> np.ndarray:
    """Write a training split of random tokens; return them."""
    folder.mkdir(exist_ok=True)
    tokens = np.random.default_rng(0).integers(0, vocab_size, sum(lengths))
    records, at = [], 0
    for i, n in enumerate(lengths):
        mine, name = tokens[at : at + n], f"train_{i:05d}.h5"
        offsets = np.arange(0, n, 100, dtype=np.uint64)
        attributes: dict[str, Any] = {"split": "train", "vocab_size": vocab_size, "tokenizer_sha256": "ab", "shard": i}
        masks = [(mine % 2).astype(np.uint8)] if mask else None
        said = write_shard(folder / name, [mine[: n // 2], mine[n // 2 :]], n, offsets, attributes, masks)
        records.append(FileRecord(name, "train", n, len(offsets), 2 * n, *said))
        at += n
    totals = SplitRecord(at, sum(r.documents for r in records), 2 * at, mask)
    (folder / "index.json").write_text(Index(vocab_size, vocab_size - 1, "byte", "ab", {"train": totals}, records, {}).to_json())
    return tokens


def change_index(folder: Path, change: Any) -> None:
    raw = json.loads((folder / "index.json").read_text())
    change(raw)
    (folder / "index.json").write_text(json.dumps(raw))


def adopt(folder: Path, i: int = 0) -> None:
    """Update the index to the file's bytes, so that only its structure can reveal the fault."""
    path = folder / f"train_{i:05d}.h5"

    def change(raw: Any) -> None:
        raw["files"][i] |= dict(zip(("crc32", "sha256"), checksums(path), strict=True), size=path.stat().st_size)

    change_index(folder, change)


@pytest.mark.parametrize("vocab_size", [300, 65536, 65537, 200_000])
def test_what_was_written_is_read(tmp_path: Path, vocab_size: int) -> None:
    tokens = make_shards(tmp_path, vocab_size=vocab_size)
    stream = TokenStream(tmp_path)
    stream.check(contents=True)
    assert (stream.num_tokens, stream.vocab_size, stream.eod) == (len(tokens), vocab_size, vocab_size - 1)
    assert stream.token_bytes == (2 if vocab_size <= 65536 else 4) and stream.text_bytes == 2 * len(tokens)
    np.testing.assert_array_equal(stream.read(0, len(tokens)), tokens)
    np.testing.assert_array_equal(stream.doc_offsets(0), np.arange(0, 1000, 100))
    assert stream.read_mask(0, 5) is None and not stream.has_loss_mask


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_range_is_read_across_shards(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "ranges"
    tokens = make_shards(folder) if not folder.exists() else np.random.default_rng(0).integers(0, 300, sum(LENGTHS))
    stream = TokenStream(folder)
    start = data.draw(st.integers(0, len(tokens)))
    count = data.draw(st.integers(0, len(tokens) - start))
    found = stream.read(start, count)
    np.testing.assert_array_equal(found, tokens[start : start + count])
    assert found.flags.writeable and found.flags.owndata
    stream.advise(start, count)
    assert stream.bytes_read == stream.bytes_fetched == count * stream.token_bytes
    ends = np.cumsum(LENGTHS)
    expected = {int(np.searchsorted(ends, p, side="right")) for p in range(start, start + count)}
    assert stream.files_of(start, count) == sorted(expected)
    if count:
        name, at = stream.locate(start)
        i = int(name[6:11])
        assert at == start - sum(LENGTHS[:i])


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 5101), (5100, 1)])
def test_ranges_outside_are_refused(tmp_path: Path, start: int, count: int) -> None:
    make_shards(tmp_path)
    with pytest.raises(ValueError, match="outside"):
        TokenStream(tmp_path).read(start, count)


def test_a_loss_mask_is_read(tmp_path: Path) -> None:
    tokens = make_shards(tmp_path, mask=True)
    stream = TokenStream(tmp_path)
    stream.check(contents=True)
    mask = stream.read_mask(990, 100)
    assert mask is not None and mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, tokens[990:1090] % 2 == 1)


def test_a_mask_or_an_end_of_document_that_the_index_contradicts_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path, mask=True)
    change_index(tmp_path, lambda raw: raw["splits"]["train"].pop("loss_mask"))
    with pytest.raises(DataError, match="it has a loss mask, but index.json says that there is none"):
        TokenStream(tmp_path).check()
    make_shards(tmp_path)
    with h5py.File(tmp_path / "train_00001.h5", "a") as file:
        file.attrs["eod"] = np.int64(7)
    adopt(tmp_path, 1)
    with pytest.raises(DataError, match=r"train_00001.h5: its attribute eod is 7, but index.json implies 299"):
        TokenStream(tmp_path).check()


@pytest.mark.parametrize("key", ["window", "loss_mask"])
def test_a_key_that_nobody_knows_is_refused(tmp_path: Path, key: str) -> None:
    """Otherwise a damaged key would silently be the default: no mask, or documents that are not kept apart."""
    make_shards(tmp_path, mask=True)
    text = (tmp_path / "index.json").read_text().replace('"eod"', '"window": 64, "eod"')
    (tmp_path / "index.json").write_text(text.replace(f'"{key}"', f'"{key[:-1]}_"'))
    with pytest.raises(DataError, match=f"'{key[:-1]}_' is not a key of"):
        TokenStream(tmp_path)


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = make_shards(tmp_path, [100] * 30)
    monkeypatch.setattr("mpidp.data.shards.most_open_files", lambda: 16)
    before, stream = len(os.listdir("/proc/self/fd")), TokenStream(tmp_path)
    stream.check(contents=True)
    for _ in range(2):
        np.testing.assert_array_equal(stream.read(0, len(tokens)), tokens)
        np.testing.assert_array_equal(np.flatnonzero(stream.read_starts(0, len(tokens))), np.arange(0, 3000, 100))
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_the_limit_of_open_files_is_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        assert most_open_files() == min(hard, 1 << 16) == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_system_without_locks(tmp_path: Path) -> None:
    """Some network file systems refuse flock. HDF5 would then refuse to write."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("SKIPPED FOR LACK OF a C compiler")
    (tmp_path / "no.c").write_text("#include <errno.h>\nint flock(int f, int o) { errno = ENOLCK; return -1; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "no.so", tmp_path / "no.c"], check=True)
    code = "import sys; from pathlib import Path; from tests.unit.test_shards import make_shards; make_shards(Path(sys.argv[1]))"
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "no.so")}
    words = [sys.executable, "-c", code, tmp_path / "shards"]
    found = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    TokenStream(tmp_path / "shards").check(contents=True)


def test_a_full_disk_is_an_error_of_the_system_and_nothing_is_left(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match=r"File too large: .*train_00000.h5"):
            make_shards(tmp_path, [100_000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    make_shards(tmp_path / "a", mask=True)
    make_shards(tmp_path / "b", mask=True)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert not [p for p in (tmp_path / "a").iterdir() if p.name.startswith(".")]


def test_a_shard_with_too_few_tokens_never_appears(tmp_path: Path) -> None:
    attributes: dict[str, Any] = {"split": "train", "vocab_size": 300, "tokenizer_sha256": "ab"}
    with pytest.raises(ValueError, match="expected 11 tokens, got 10"):
        write_shard(tmp_path / "train_00000.h5", [np.arange(10)], 11, np.array([0]), attributes)
    assert not list(tmp_path.iterdir())


def test_only_the_index_is_read_at_first(tmp_path: Path) -> None:
    tokens = make_shards(tmp_path)
    (tmp_path / "train_00002.h5").unlink()
    stream = TokenStream(tmp_path)
    np.testing.assert_array_equal(stream.read(0, 1003), tokens[:1003])
    stream.check(files=[0, 1, 3])
    with pytest.raises(DataError, match="train_00002.h5.*missing"):
        stream.check()
    with pytest.raises(DataError, match="train_00002.h5.*missing"):
        stream.read(1000, 10)


def rewrite(path: Path, name: str, make: Any) -> None:
    """Replace a dataset by the result of make(file)."""
    with h5py.File(path, "r+") as file:
        del file[name]
        make(file)


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=(1000,), dtype="<u2")
    layout[:] = h5py.VirtualSource("train_00002.h5", "tokens", shape=(4096,))[:1000]
    file.create_virtual_dataset("tokens", layout)


def compound_like(file: h5py.File) -> None:
    file.create_dataset("tokens", data=np.zeros(1000, "<u2"), dtype=h5py.enum_dtype({"A": 0}, "<u2"))


HOSTILE = {
    "external": lambda f: f.create_dataset("tokens", shape=(1000,), dtype="<u2", external=[("secret", 0, 2000)]),
    "soft link": lambda f: f.update(elsewhere=np.zeros(1000, "<u2"), tokens=h5py.SoftLink("/elsewhere")),
    "external link": lambda f: f.__setitem__("tokens", h5py.ExternalLink("copy.h5", "/tokens")),
    "virtual": virtual,
    "chunked": lambda f: f.create_dataset("tokens", data=np.zeros(1000, "<u2"), chunks=(10,)),
    "gzip": lambda f: f.create_dataset("tokens", data=np.zeros(1000, "<u2"), compression="gzip"),
    "huge": lambda f: f.create_dataset("tokens", shape=(2**45,), dtype="<u2"),
    "declared only": lambda f: f.create_dataset("tokens", shape=(1000,), dtype="<u2"),
    "longer": lambda f: f.create_dataset("tokens", data=np.zeros(1001, "<u2")),
    "two dimensions": lambda f: f.create_dataset("tokens", data=np.zeros((10, 100), "<u2")),
    "scalar": lambda f: f.create_dataset("tokens", data=np.uint16(3)),
    "group": lambda f: f.create_group("tokens"),
    "signed": lambda f: f.create_dataset("tokens", data=np.zeros(1000, "<i2")),
    "big endian": lambda f: f.create_dataset("tokens", data=np.zeros(1000, ">u2")),
    "float": lambda f: f.create_dataset("tokens", data=np.zeros(1000, "<f2")),
    "wider": lambda f: f.create_dataset("tokens", data=np.zeros(1000, "<u4")),
    "enum": compound_like,
    "gone": lambda f: None,
}


REASONS = {"soft link": "or is only a link", "external link": "or is only a link", "gone": "or is only a link",
           "group": "not a dataset", "huge": "shape", "declared only": "inside the file", "scalar": "shape"} | dict.fromkeys(
    ("external", "virtual", "chunked", "gzip"), "contiguously") | dict.fromkeys(("signed", "float", "wider", "enum"), "type")


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_datasets_are_refused(tmp_path: Path, kind: str) -> None:
    make_shards(tmp_path)
    (tmp_path / "secret").write_bytes(b"s" * 2000)
    shutil.copy(tmp_path / "train_00000.h5", tmp_path / "copy.h5")
    rewrite(tmp_path / "train_00000.h5", "tokens", HOSTILE[kind])
    adopt(tmp_path)
    stream = TokenStream(tmp_path)
    for act in (stream.check, lambda: stream.read(0, 10), lambda: stream.advise(0, 10)):
        with pytest.raises(DataError, match=f"train_00000.h5.*tokens.*{REASONS.get(kind, '')}.*prepare"):
            act()


def test_attributes_must_agree_with_the_index(tmp_path: Path) -> None:
    changes: list[tuple[str, Any]] = [("format", b"other"), ("version", 2), ("split", b"val"), ("vocab_size", 5),
                                      ("tokenizer_sha256", b"cd"), ("version", [1, 1]), ("format", None)]
    for name, value in changes:
        make_shards(tmp_path)
        with h5py.File(tmp_path / "train_00000.h5", "r+") as file:
            del file.attrs[name]
            if value is not None:
                file.attrs[name] = np.bytes_(value) if isinstance(value, bytes) else value
        adopt(tmp_path)
        with pytest.raises(DataError, match="train_00000.h5.*attribute"):
            TokenStream(tmp_path).check()


@pytest.mark.parametrize("size", [0, 1, 100, 2000, 4000])
def test_truncated_files_are_refused(tmp_path: Path, size: int) -> None:
    make_shards(tmp_path)
    os.truncate(tmp_path / "train_00000.h5", size)
    with pytest.raises(DataError, match="train_00000.h5.*bytes"):
        TokenStream(tmp_path).check()
    if size:
        adopt(tmp_path)  # a matching index does not help
        with pytest.raises(DataError, match="train_00000.h5"):
            TokenStream(tmp_path).check()


@pytest.mark.parametrize("tokens", [200, 200_000])
def test_a_file_that_is_truncated_while_it_is_in_use_is_refused(tmp_path: Path, tokens: int) -> None:
    """Without a check, the missing part reads as zeros up to the end of the page, and as SIGBUS after it."""
    make_shards(tmp_path, [tokens])
    stream = TokenStream(tmp_path)
    stream.check()
    stream.read(0, tokens)
    os.truncate(tmp_path / "train_00000.h5", stream.files[0].size // 2)
    with pytest.raises(DataError, match="train_00000.h5: it was truncated while it was in use"):
        stream.read(tokens - 100, 100)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    make_shards(tmp_path, [200])
    path = tmp_path / "train_00000.h5"
    data = path.read_bytes()
    for at in np.random.default_rng(1).integers(0, len(data), 60):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(DataError, match="train_00000.h5"):
            TokenStream(tmp_path).check(contents=True)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path)
    (tmp_path / "train_00000.h5").unlink()
    os.mkfifo(tmp_path / "train_00000.h5")
    with pytest.raises(DataError, match="not a regular file"):
        TokenStream(tmp_path).check()


@pytest.mark.parametrize("offsets", [[0, 5, 5], [7, 3], [0, 1000]])
def test_document_offsets_ascend_inside_the_file(tmp_path: Path, offsets: list[int]) -> None:
    make_shards(tmp_path, [1000])
    rewrite(tmp_path / "train_00000.h5", "doc_offsets",
            lambda f: f.create_dataset("doc_offsets", data=np.array(offsets, dtype="<u8")))
    adopt(tmp_path)

    def change(raw: Any) -> None:
        raw["files"][0]["documents"] = raw["splits"]["train"]["documents"] = len(offsets)

    change_index(tmp_path, change)
    with pytest.raises(DataError, match="ascend"):
        TokenStream(tmp_path).doc_offsets(0)


def set_file(key: str, value: Any) -> Any:
    return lambda raw: raw["files"][0].__setitem__(key, value)


INDEX_CHANGES = {
    "parent": set_file("name", "../train_00000.h5"), "absolute": set_file("name", "/etc/train.h5"),
    "dots": set_file("name", ".."), "folder": set_file("name", "a/b.h5"), "nul": set_file("name", "a\0.h5"),
    "newline": set_file("name", "a.h5\n"),
    "twice": set_file("name", "train_00001.h5"), "name type": set_file("name", 5), "tokens": set_file("tokens", 999),
    "negative": set_file("tokens", -1), "zero": set_file("tokens", 0), "float": set_file("tokens", 1000.0),
    "bool": set_file("tokens", True), "huge": set_file("tokens", 2**70), "stray split": set_file("split", "test"),
    "missing": lambda raw: raw["files"][0].pop("sha256"), "format": lambda raw: raw.update(format="x"),
    "newer": lambda raw: raw.update(version=2), "no files": lambda raw: raw.update(files=[]),
    "files type": lambda raw: raw.update(files=7), "file type": lambda raw: raw.update(files=[7]),
    "splits type": lambda raw: raw.update(splits=[1]), "eod": lambda raw: raw.update(eod=300),
    "tokenizer": lambda raw: raw.update(tokenizer="byte"), "vocabulary": lambda raw: raw.update(vocab_size="300"),
}


@pytest.mark.parametrize("kind", INDEX_CHANGES)
def test_a_hostile_index_is_refused(tmp_path: Path, kind: str) -> None:
    make_shards(tmp_path)
    change_index(tmp_path, INDEX_CHANGES[kind])
    with pytest.raises(DataError, match="index.json.*Prepare"):
        TokenStream(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\xff"])
def test_an_index_that_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="index.json"):
        TokenStream(tmp_path)


def test_missing_folders_and_splits_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data_tools.prepare"):
        TokenStream(tmp_path / "nothing")
    make_shards(tmp_path)
    with pytest.raises(DataError, match="no split 'val', but only train"):
        TokenStream(tmp_path, "val")


def test_the_hash_of_the_index_is_of_its_bytes(tmp_path: Path) -> None:
    make_shards(tmp_path / "a")
    make_shards(tmp_path / "b")
    assert TokenStream(tmp_path / "a").index_sha256 == TokenStream(tmp_path / "b").index_sha256
    change_index(tmp_path / "b", lambda raw: raw.update(source={"x": 1}))
    assert TokenStream(tmp_path / "a").index_sha256 != TokenStream(tmp_path / "b").index_sha256

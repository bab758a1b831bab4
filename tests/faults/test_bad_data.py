"""Data that cannot be used for training: exit code 3, one message that names the file, and no run is started.

| fault | expected | checked |
|---|---|---|
| no folder, no index, an invalid index | 3, how to prepare data | code, output; no run.dir |
| a shard missing, truncated, empty, a folder, not HDF5; a flipped bit in a header | 3, the file named | output: train, verify |
| a flipped bit in the tokens | 3 unless data.verify=false, and in verify | code, output |
| hostile HDF5: external storage, links, virtual, chunked, packed, wrong rank, type, shape, user block | 3 | same |
| the same on one rank of several | 3, reported once | code of both mpiruns |
| ids outside the vocabulary, in training and in validation | 3, file and position | code, output |
| a corpus shorter than one window; no validation split for evaluate | 3 | code, output |
| tokenizer.json beside the shards missing or truncated | 3 | code, output |
| data of a different tokenizer given to evaluate | 3 | code, output |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpidp.data.shard_writer import checksums, write_shard
from tests.faults.commands import Forks, Shell, expect

SHARD = "train_00001.h5"


def relist(shards: Path, name: str = SHARD) -> None:
    """Update a file's size and checksums in index.json, so that only its content can reveal the fault."""
    index = json.loads((shards / "index.json").read_text())
    record = next(r for r in index["files"] if r["name"] == name)
    record["size"] = (shards / name).stat().st_size
    record["crc32"], record["sha256"] = checksums(shards / name)
    (shards / "index.json").write_text(json.dumps(index))


def refused(place: Path, forks: Forks, *phrases: str, verify: bool = True, words: tuple[str, ...] = ()) -> None:
    """Assert that train and verify both reject the data with code 3 and a message that contains the phrases."""
    expect(forks.run(place, "mpidp.train", "tiny.toml", *words), 3, *phrases)
    assert not (place / "run").exists()
    if verify:
        expect(forks.run(place, "data_tools.verify", "shards"), 3, *phrases)


# --- the index

BAD_INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another format": (lambda i: i | {"format": "x"}, "its format is not"),
    "a later version": (lambda i: i | {"version": 99}, "its version is 99"),
    "a list": (lambda i: [i], "its format is not"),
    "no files": (lambda i: {k: v for k, v in i.items() if k != "files"}, "files is missing"),
    "fewer tokens": (lambda i: i | {"splits": i["splits"] | {"train": i["splits"]["train"] | {"tokens": 5}}},
                     "`tokens` of split 'train' is not the sum of `tokens` of its files"),
    "a path": (lambda i: i | {"files": [f | {"name": "../" + f["name"]} for f in i["files"]]}, "is not a plain file name"),
    "a file twice": (lambda i: i | {"files": [f | {"name": SHARD} for f in i["files"]]}, "lists a file twice"),
    "negative": (lambda i: i | {"vocab_size": -1}, "vocab_size must be an integer in 1..4294967296, but is -1"),
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_an_index_that_is_not_one(place: Path, forks: Forks, name: str) -> None:
    change, phrase = BAD_INDEXES[name]
    path = place / "shards" / "index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    refused(place, forks, "shards/index.json is not a valid shard index", phrase, "Prepare the shards again")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "bytes", "deep"])
def test_an_index_that_is_not_json(place: Path, forks: Forks, content: bytes) -> None:
    (place / "shards" / "index.json").write_bytes(content)
    refused(place, forks, "shards/index.json", "is not valid JSON", "Prepare the shards again")


def test_no_index(place: Path, forks: Forks) -> None:
    (place / "shards" / "index.json").unlink()
    refused(place, forks, "no shards at shards", "python -m data_tools.prepare --out shards")


def test_no_folder_under_mpirun(either: Shell) -> None:
    ended = either.train("--data.path=absent", ranks=2)
    expect(ended, 3, "no shards at absent", "python -m data_tools.prepare --out absent")


# --- damaged files


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "it is missing"),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "so it is truncated or the wrong file"),
    "of no bytes": (lambda p: p.write_bytes(b""), "it has 0 bytes"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "so it is truncated or the wrong file"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "it is not a regular file"),
    "a dangling link": (lambda p: (p.unlink(), p.symlink_to("nowhere")), "it is missing"),
    "noise": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(p.stat().st_size)), "it cannot be opened as HDF5"),
    "a flipped bit in the signature": (lambda p: flip(p, 1), "it cannot be opened as HDF5"),
    "zeros": (lambda p: p.write_bytes(bytes(p.stat().st_size)), "it cannot be opened as HDF5"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_shard(place: Path, forks: Forks, name: str) -> None:
    damage, phrase = DAMAGES[name]
    damage(place / "shards" / SHARD)
    refused(place, forks, f"shards/{SHARD}: it ", phrase, "Restore the file, or prepare shards again")


def test_a_shard_that_one_rank_of_several_finds_damaged(either: Shell) -> None:
    path = either.folder / "shards" / SHARD
    path.write_bytes(path.read_bytes()[:-100])
    expect(either.train(ranks=3), 3, f"rank 1: shards/{SHARD}: it has", "truncated")
    assert not (either.folder / "run").exists()


def test_every_flipped_bit_of_a_header_is_refused_or_harmless(place: Path, forks: Forks) -> None:
    """Flip bits all over the headers, which are small. The commands must not crash, and exit with 0 or 3."""
    path = place / "shards" / SHARD
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    places = sorted(map(int, rng.choice(2048, 40, replace=False)))
    script = f"""
from mpidp.data.shards import TokenStream
from mpidp.errors import DataError
whole = open({str(path)!r}, "rb").read()
for at in {places}:
    content = bytearray(whole)
    content[at] ^= 1 << at % 8
    open({str(path)!r}, "wb").write(content)
    try:
        TokenStream("shards").check()
    except DataError:
        pass
"""
    ended = forks.run(place, "data_tools.verify", "shards", inject=script)
    expect(ended, 3, f"shards/{SHARD}: ")
    path.write_bytes(whole)
    expect(forks.run(place, "data_tools.verify", "shards"), 0)


def test_a_flipped_bit_in_the_tokens(place: Path, forks: Forks) -> None:
    path = place / "shards" / SHARD
    with h5py.File(path, "r") as file:
        begin = file["tokens"].id.get_offset()
    flip(path, begin + 1000)
    for words in ((), ("--data.verify=true",)):  # small shards are always checked
        refused(place, forks, f"shards/{SHARD}: its bytes changed since index.json was written", words=words)
    expect(forks.run(place, "mpidp.train", "tiny.toml", "--data.verify=false"), 0)


def test_data_verify_of_whole_data(place: Path, forks: Forks) -> None:
    expect(forks.run(place, "mpidp.train", "tiny.toml", "--data.verify=true"), 0)


# --- hostile HDF5: files with valid checksums and invalid content


def plain(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> None:
    file.create_dataset(name, data=np.zeros(shape, dtype))


def external(file: h5py.File, count: int) -> None:
    outside = Path(file.filename).parent.parent / "tiny.toml"  # any file of the machine
    file.create_dataset("tokens", (count,), "<u2", external=[(str(outside), 0, 2 * count)])


def soft(file: h5py.File, count: int) -> None:
    plain(file, "other", (count,), "<u2")
    file["tokens"] = h5py.SoftLink("/other")


def elsewhere(file: h5py.File, count: int) -> None:
    with h5py.File(Path(file.filename).with_name("other.hdf5"), "w") as other:
        plain(other, "tokens", (count,), "<u2")
    file["tokens"] = h5py.ExternalLink("other.hdf5", "/tokens")


def virtual(file: h5py.File, count: int) -> None:
    with h5py.File(Path(file.filename).with_name("other.hdf5"), "w") as other:
        plain(other, "tokens", (count,), "<u2")
    layout = h5py.VirtualLayout((count,), "<u2")
    layout[:] = h5py.VirtualSource("other.hdf5", "tokens", (count,))
    file.create_virtual_dataset("tokens", layout)


def absurd(file: h5py.File, count: int) -> None:
    """Declare 2**60 tokens in a file of a few kilobytes."""
    kind = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    kind.set_chunk((2**20,))
    h5py.h5d.create(file.id, b"tokens", h5py.h5t.STD_U16LE, h5py.h5s.create_simple((2**60,)), kind)


def unwritten(file: h5py.File, count: int) -> None:
    """Declare a dataset without allocating its space in the file."""
    file.create_dataset("tokens", (count,), "<u2")


HOSTILE: dict[str, tuple[Callable[[h5py.File, int], object], str]] = {
    "external storage": (external, "its dataset tokens is not stored contiguously, without filters and inside the file"),
    "a soft link": (soft, "its dataset tokens is missing, or is only a link"),
    "an external link": (elsewhere, "its dataset tokens is missing, or is only a link"),
    "a virtual dataset": (virtual, "tokens is not stored contiguously"),
    "chunks": (lambda f, n: f.create_dataset("tokens", data=np.zeros(n, "<u2"), chunks=(100,)), "not stored contiguously"),
    "packed": (lambda f, n: f.create_dataset("tokens", data=np.zeros(n, "<u2"), compression="gzip"), "not stored contiguously"),
    "two dimensions": (lambda f, n: plain(f, "tokens", (n, 1), "<u2"), "tokens has shape"),
    "a scalar": (lambda f, n: plain(f, "tokens", (), "<u2"), "tokens has shape ()"),
    "one too few": (lambda f, n: plain(f, "tokens", (n - 1,), "<u2"), "tokens has shape"),
    "floats": (lambda f, n: plain(f, "tokens", (n,), "<f2"), "tokens is not of type uint16"),
    "signed": (lambda f, n: plain(f, "tokens", (n,), "<i2"), "tokens is not of type uint16"),
    "the other byte order": (lambda f, n: plain(f, "tokens", (n,), ">u2"), "tokens is not of type uint16"),
    "too wide": (lambda f, n: plain(f, "tokens", (n,), "<u4"), "tokens is not of type uint16"),
    "an absurd shape": (absurd, "tokens is not stored contiguously"),
    "unwritten": (unwritten, "tokens does not lie inside the file"),
    "a group": (lambda f, n: f.create_group("tokens"), "tokens is not a dataset"),
    "nothing": (lambda f, n: None, "its dataset tokens is missing, or is only a link"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_hdf5(place: Path, forks: Forks, name: str) -> None:
    make, phrase = HOSTILE[name]
    path = place / "shards" / SHARD
    with h5py.File(path, "r") as good:
        attributes, count, offsets = dict(good.attrs), good["tokens"].shape[0], good["doc_offsets"][:]
    with h5py.File(path, "w", libver=("earliest", "v110")) as file:
        for key, value in attributes.items():
            file.attrs[key] = value
        file.create_dataset("doc_offsets", data=offsets)
        make(file, count)
    relist(path.parent)
    refused(place, forks, f"shards/{SHARD}: ", phrase)


@pytest.mark.parametrize("attribute", ["format", "version", "split", "vocab_size", "tokenizer_sha256"])
def test_a_shard_of_other_shards(place: Path, forks: Forks, attribute: str) -> None:
    path = place / "shards" / SHARD
    with h5py.File(path, "r+") as file:
        old = file.attrs[attribute]
        file.attrs.modify(attribute, np.int64(9) if isinstance(old, np.integer) else np.bytes_("other"))
    relist(path.parent)
    refused(place, forks, f"shards/{SHARD}: its attribute {attribute} is", "index.json implies")


def test_a_user_block(place: Path, forks: Forks) -> None:
    path = place / "shards" / SHARD
    path.write_bytes(bytes(512) + path.read_bytes())
    relist(path.parent)
    refused(place, forks, f"shards/{SHARD}: ")


# --- ids, lengths, tokenizers


def with_bad_id(place: Path, name: str, at: int) -> None:
    """Rewrite a shard with one id outside the vocabulary. Everything else, including checksums, stays valid."""
    path = place / "shards" / name
    with h5py.File(path, "r") as good:
        tokens, offsets = good["tokens"][:], good["doc_offsets"][:]
        attributes = {k: v.decode() if isinstance(v, bytes) else int(v) for k, v in good.attrs.items()
                      if k not in ("format", "version")}
    tokens[at] = 999
    write_shard(path, [tokens], len(tokens), offsets, attributes)
    relist(path.parent, name)


def test_an_id_beyond_the_vocabulary(place: Path, forks: Forks) -> None:
    with_bad_id(place, "train_00000.h5", 500)
    ended = forks.run(place, "mpidp.train", "tiny.toml", "--data.order=sequential", "--train.steps=40")
    expect(ended, 3, "shards/train_00000.h5: token 500 is 999, not below vocab_size 257", "data_tools.verify shards")
    expect(forks.run(place, "data_tools.verify", "shards"), 3, "shards/train_00000.h5: token 500 is 999")


def test_an_id_beyond_the_vocabulary_that_one_rank_reads(either: Shell) -> None:
    with_bad_id(either.folder, "train_00000.h5", 500)
    ended = either.train("--data.order=sequential", "--train.steps=40", ranks=2)
    assert ended.code == 3 and "Traceback" not in ended.said, ended
    assert ended.err.count("shards/train_00000.h5: token 500 is 999") == 1, ended


def test_verify_finds_an_id_beyond_the_vocabulary_in_validation(place: Path, forks: Forks) -> None:
    with_bad_id(place, "val_00000.h5", 20)
    expect(forks.run(place, "data_tools.verify", "shards"), 3, "shards/val_00000.h5: token 20 is 999")


def test_an_id_beyond_the_vocabulary_in_validation(place: Path, forks: Forks, finished: Path) -> None:
    with_bad_id(place, "val_00000.h5", 20)
    ended = forks.run(place, "mpidp.evaluate", finished, "--data", "shards")
    expect(ended, 3, "shards/val_00000.h5: token 20 is 999")


def test_a_corpus_shorter_than_one_window(place: Path, forks: Forks) -> None:
    ended = forks.run(place, "mpidp.train", "tiny.toml", "--model.seq_len=100000")
    expect(ended, 3, "shards: ", "fewer than one training window (model.seq_len + 1 = 100001 tokens)", "lower model.seq_len")


TOKENIZERS: dict[str, Callable[[Path], object]] = {
    "missing": lambda p: p.unlink(),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:20]),
    "of no bytes": lambda p: p.write_bytes(b""),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_verify_refuses_a_tokenizer_that_does_not_belong_to_the_shards(place: Path, forks: Forks, name: str) -> None:
    TOKENIZERS[name](place / "shards" / "tokenizer.json")
    expect(forks.run(place, "data_tools.verify", "shards"), 3, "shards/tokenizer.json")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_train_refuses_a_tokenizer_that_does_not_belong_to_the_shards(place: Path, forks: Forks, name: str) -> None:
    TOKENIZERS[name](place / "shards" / "tokenizer.json")
    expect(forks.run(place, "mpidp.train", "tiny.toml"), 3, "shards/tokenizer.json")


def test_evaluate_with_data_of_another_tokenizer(place: Path, forks: Forks, finished: Path) -> None:
    (place / "text.txt").write_text("other text\n" * 300)
    expect(forks.run(place, "data_tools.prepare", "--source", "text.txt", "--tokenizer", "char", "--out", "others"), 0)
    ended = forks.run(place, "mpidp.evaluate", finished, "--data", "others")
    expect(ended, 3, "others was prepared with another tokenizer")


def test_evaluate_without_a_validation_split(place: Path, forks: Forks, finished: Path) -> None:
    (place / "text.txt").write_text("other text\n" * 300)
    expect(forks.run(place, "data_tools.prepare", "--source", "text.txt", "--val-fraction", "0", "--out", "others"), 0)
    expect(forks.run(place, "mpidp.evaluate", finished, "--data", "others"), 3, "others has no split 'val'")
    expect(forks.run(place, "mpidp.evaluate", finished, "--data", "absent"), 3, "no shards at absent")
    expect(forks.run(place, "mpidp.evaluate", finished, "--data", "others", "--split", "train"), 0)


def test_generate_with_another_tokenizer(place: Path, forks: Forks, finished: Path) -> None:
    (place / "text.txt").write_text("other text\n" * 300)
    expect(forks.run(place, "data_tools.prepare", "--source", "text.txt", "--tokenizer", "char", "--out", "others"), 0)
    expect(forks.run(place, "mpidp.generate", finished, "--tokenizer", "others"), 3, "the tokenizer has")
    expect(forks.run(place, "mpidp.generate", finished, "--tokenizer", "absent"), 3, "absent")

"""Laws of convert with Megatron-LM's files: a round trip keeps tokens and documents; inconsistent files are rejected."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data_tools.convert import read_options
from data_tools.formats.megatron import MAGIC, MegatronReader, dtype_code
from data_tools.from_tokens import FromOptions, from_tokens
from data_tools.prepare import prepare
from data_tools.to_tokens import to_tokens
from mpidp.data.shards import TokenStream
from mpidp.errors import DataError, UsageError
from mpidp.export import read_options as read_export
from tests.tiny import masked_corpus


def to_megatron(shards: Path, prefix: Path) -> list[str]:
    return to_tokens("megatron", shards, prefix)


def from_megatron(prefix: Path, out: Path, tokenizer: str, shards: int, val_fraction: float, eod: str | None) -> list[str]:
    return from_tokens("megatron", prefix, out, FromOptions(tokenizer, shards, val_fraction, eod))


def documents_of(path: Path, split: str) -> list[list[int]]:
    """Return the documents; the first may have begun in an earlier split."""
    stream = TokenStream(path, split)
    bases = np.cumsum([0, *(record.tokens for record in stream.files)])
    starts = {0, *(int(at) + int(base) for i, base in enumerate(bases[:-1]) for at in stream.doc_offsets(i))}
    ids = stream.read(0, stream.num_tokens).tolist()
    edges = [*sorted(starts), len(ids)]
    return [ids[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def independent(prefix: Path) -> list[list[int]]:
    """Read files independently, from the description of the format; each document is one sequence."""
    raw = Path(f"{prefix}.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, bounds = struct.unpack_from("<QBQQ", raw, 9)
    assert (version, bounds) == (1, sequences + 1)
    lengths = struct.unpack_from(f"<{sequences}i", raw, 34)
    pointers = struct.unpack_from(f"<{sequences}q", raw, 34 + 4 * sequences)
    assert struct.unpack_from(f"<{bounds}q", raw, 34 + 12 * sequences) == tuple(range(bounds))
    assert len(raw) == 34 + 12 * sequences + 8 * bounds
    ids = np.fromfile(f"{prefix}.bin", {8: "<u2", 4: "<i4"}[code])
    assert sum(lengths) == len(ids)
    size = ids.itemsize
    return [ids[at // size : at // size + length].tolist() for at, length in zip(pointers, lengths, strict=True)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"text {i} " * (i * i % 17 + 1))
    prepare(str(folder), "byte", tmp_path / "shards", shards=3, val_fraction=0.3, verbose=False)
    return tmp_path / "shards"


def test_there_and_back(shards: Path, tmp_path: Path) -> None:
    said = to_megatron(shards, tmp_path / "deep/it")
    assert len(said) == 2 and f"it_train: {TokenStream(shards).num_tokens:,} tokens" in said[0]
    for split in ("train", "val"):
        assert independent(tmp_path / f"deep/it_{split}") == documents_of(shards, split)
        assert [ids.tolist() for ids in MegatronReader(tmp_path / f"deep/it_{split}").documents()] == documents_of(shards, split)
    from_megatron(tmp_path / "deep/it", tmp_path / "back", str(shards / "tokenizer.json"), 5, 0.0, None)
    for split in ("train", "val"):
        assert documents_of(tmp_path / "back", split) == documents_of(shards, split)
        TokenStream(tmp_path / "back", split).check(contents=True)
    back, first = TokenStream(tmp_path / "back").index, TokenStream(shards).index
    assert back.tokenizer_sha256 == first.tokenizer_sha256
    assert {k: s.text_bytes for k, s in back.splits.items()} == {k: s.text_bytes for k, s in first.splits.items()}
    to_megatron(tmp_path / "back", tmp_path / "again")
    for end in ("train.bin", "train.idx", "val.bin", "val.idx"):
        assert (tmp_path / f"again_{end}").read_bytes() == (tmp_path / f"deep/it_{end}").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def write(prefix: Path, code: int, lengths: list[int], bounds: list[int], ids: np.ndarray, modes: bytes = b"") -> None:
    pointers = np.cumsum([0, *lengths])[:-1] * ids.itemsize
    Path(f"{prefix}.bin").write_bytes(ids.tobytes())
    Path(f"{prefix}.idx").write_bytes(
        MAGIC + struct.pack("<QBQQ", 1, code, len(lengths), len(bounds)) + np.array(lengths, "<i4").tobytes()
        + pointers.astype("<i8").tobytes() + np.array(bounds, "<i8").tobytes() + modes
    )


@pytest.mark.parametrize(("code", "dtype"), [(1, "<u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_files_of_others(tmp_path: Path, code: int, dtype: str) -> None:
    """Files with all integer types, documents of several sequences and of none, and modes; the end becomes validation."""
    ids = (np.arange(40) * 7 % 120).astype(dtype)
    write(tmp_path / "it", code, [5, 0, 10, 5, 20], [0, 2, 2, 4, 5], ids, b"\0" * 5)
    said = from_megatron(tmp_path / "it", tmp_path / "out", "byte", 2, 0.25, None)
    assert said[-1] == "1 document without tokens was skipped"
    assert documents_of(tmp_path / "out", "train") == [ids[:5].tolist(), ids[5:20].tolist(), ids[20:30].tolist()]
    assert documents_of(tmp_path / "out", "val") == [ids[30:].tolist()]
    assert TokenStream(tmp_path / "out", "val").num_documents == 0


def test_sequences_that_are_not_text_are_counted(tmp_path: Path) -> None:
    for name, modes in (("one", b"\0\1\0"), ("two", b"\2\0\xff"), ("none", b"\0\0\0")):
        write(tmp_path / name, 8, [4, 4, 4], [0, 1, 2, 3], np.arange(12, dtype="<u2"), modes)
    names = ("one", "two", "none")
    said = {name: from_megatron(tmp_path / name, tmp_path / f"of_{name}", "byte", 1, 0, None)[1:-1] for name in names}
    assert said["one"] == [f"{tmp_path}/one: 1 sequence with a mode other than 0 (multimodal data) was read as text"]
    two = f"{tmp_path}/two: 2 sequences with a mode other than 0 (multimodal data) were read as text"
    assert said["two"] == [two] and not said["none"]


def test_the_type_is_that_of_megatron() -> None:
    assert [dtype_code(n) for n in (257, 65499, 65500, 128256)] == [8, 8, 4, 4]


def test_what_does_not_agree_is_refused(tmp_path: Path, shards: Path) -> None:
    ids = np.arange(20, dtype="<u2")

    def refused(words: str, prefix: str = "it", tokenizer: str = "byte") -> None:
        with pytest.raises(DataError, match=words):
            from_megatron(tmp_path / prefix, tmp_path / "out", tokenizer, 1, 0.0, None)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    refused("none_train.idx: cannot be read", "none")
    write(tmp_path / "it", 8, [10, 10], [0, 1, 2], ids + 300)
    refused("token 0 has the id 300, but the tokenizer's ids are 0..256")
    write(tmp_path / "it", 4, [10, 10], [0, 1, 2], (ids.astype("<i4") - 3))
    refused("token 0 has the id -3")
    for lengths, bounds in (([10, 11], [0, 1, 2]), ([30, -10], [0, 1, 2]), ([-1, 3], [0, 2])):
        write(tmp_path / "it", 8, lengths, bounds, ids)
        refused("outside the 40 bytes")
    for bounds, words in (([0, 1], "the last document must end at 2, the number of sequences, but it ends at 1"),
                          ([0, 3, 2], "must not be negative or decrease"), ([-1, 2], "must not be negative or decrease")):
        write(tmp_path / "it", 8, [10, 10], bounds, ids)
        refused(words)
    write(tmp_path / "it", 7, [10, 10], [0, 1, 2], ids)
    refused("version 1 and ids of type 7")
    index = tmp_path / "it.idx"
    write(tmp_path / "it", 8, [10, 10], [0, 1, 2], ids)
    index.write_bytes(index.read_bytes()[:-3])
    refused("2 sequences and 3 document bounds need .* bytes")
    index.write_bytes(b"MMIDIDX")
    refused("not a Megatron-LM index")
    index.unlink()
    refused("it_train.idx: cannot be read")
    with pytest.raises(DataError, match="loss mask"):
        to_megatron(masked_corpus(tmp_path), tmp_path / "new")
    to_megatron(shards, tmp_path / "there")
    for again in (lambda: to_megatron(shards, tmp_path / "there"),
                  lambda: from_megatron(tmp_path / "there", shards, "byte", 1, 0.0, None)):
        with pytest.raises(UsageError, match="exists and is not overwritten"):
            again()


def test_options_of_from_are_refused_with_to() -> None:
    wrong = (["--shards", "4"], ["--tokenizer", "byte", "--val-fraction", "0.05"], ["--one-document"], ["--eod-at", "auto"],
             ["--rows", "part"], ["--add-eod"], ["--column", "ids"], ["--dtype", "uint16"], ["--seq-len", "8"], ["--eod", "x"])
    for words in wrong:
        named = ", ".join(word for word in words if word.startswith("--"))
        with pytest.raises(UsageError, match=f"^{named} can be given only with --from, not with --to mds"):
            read_options(["--to", "mds", "shards", "--out", "out", *words])
    found = read_options(["shards", "--out", "out", "--tokenizer", "byte", "--shards", "9"])
    assert (found.tokenizer, found.shards, found.source) == ("byte", 9, "auto")


def test_an_end_that_a_tokenizer_cannot_have_is_refused(shards: Path, tmp_path: Path) -> None:
    to_megatron(shards, tmp_path / "it")
    with pytest.raises(UsageError, match="--eod x: --tokenizer byte has an end-of-document token of its own"):
        from_megatron(tmp_path / "it_train", tmp_path / "out", "byte", 1, 0.0, "x")
    with pytest.raises(DataError, match="tokenizer.json: --eod x: .* has an end-of-document token of its own. Omit"):
        from_megatron(tmp_path / "it_train", tmp_path / "out", str(shards), 1, 0.0, "x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("ids", "fraction", "words"), [
    ([1], 0.05, "the source has 1 token, but each split needs at least 2 tokens. Give more text"),
    ([1], 0.0, "the source has 1 token, but each split needs at least 2 tokens. Give more text"),
    ([1, 2, 3], 0.5, "the source has 3 tokens, but each split needs at least 2 tokens. Give more text, or set --val-fraction 0"),
])
def test_too_few_tokens_are_counted_correctly(ids: list[int], fraction: float, words: str, tmp_path: Path) -> None:
    np.array(ids, "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=f"^{words}$"):
        from_tokens("nanogpt", tmp_path / "train.bin", tmp_path / "out", FromOptions("byte", 1, fraction, whole=True))


def test_only_options_that_help_are_advised_if_a_split_is_too_small(tmp_path: Path) -> None:
    """convert has neither --seed nor --split, and --val-fraction has no effect on data with a validation split."""
    for name, ids in ("train", [1, 2, 3]), ("val", [4]):
        np.array(ids, "<u2").tofile(tmp_path / f"{name}.bin")
    said = "the source has 3 training tokens and 1 validation token, but each split needs at least 2 tokens. Give more text"
    with pytest.raises(DataError, match=f"^{said}$"):
        from_tokens("nanogpt", tmp_path, tmp_path / "out", FromOptions("byte", 1, whole=True))
    table = pa.table({"input_ids": [[1, 2, 3], [4]], "labels": [[-100, 2, 3], [4]]})
    parquet.write_table(table, tmp_path / "masked.parquet")
    with pytest.raises(DataError, match=f"^{said}, or set --val-fraction 0$"):
        from_tokens("hf", tmp_path / "masked.parquet", tmp_path / "out", FromOptions("byte", 1))
    from_tokens("hf", tmp_path / "masked.parquet", tmp_path / "out", FromOptions("byte", 1, val_fraction=0.0))


@pytest.mark.parametrize("address", ["s3://user:secret@host/x", "https://user:secret@host/x?sig=secret"])
def test_commands_for_local_files_refuse_addresses_without_their_secrets(tmp_path: Path, address: str) -> None:
    """They wrote a local folder s3:, or showed the password in an error."""
    for call in (
        lambda: read_options(["--to", "mds", "shards", "--out", address]),
        lambda: read_options([address, "--out", "x", "--tokenizer=t"]),
        lambda: read_export(["run", "--out", address]), lambda: prepare(address, "byte", tmp_path / "out"),
        lambda: prepare([f"{address}:1", "b"], "byte", tmp_path / "out"), lambda: prepare("stdlib", address, tmp_path / "out"),
        lambda: prepare("stdlib", "byte", address),
    ):
        with pytest.raises(UsageError, match="is an address.* Copy the files first") as caught:
            call()
        assert "secret" not in str(caught.value)
    assert not list(tmp_path.iterdir())

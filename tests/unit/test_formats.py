"""Laws of formats of tokens: what is written is read again with the same tokens, documents and loss mask; damaged or ambiguous
files are refused. The files here are made by hand from the descriptions of the formats; tests/programs/test_formats.py has those
of real programs."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data_tools.formats import row_files
from data_tools.formats.table import FORMATS, recognized
from data_tools.from_tokens import FromOptions, from_tokens
from data_tools.prepare import prepare
from data_tools.to_tokens import to_tokens
from mpidp.data.shards import TokenStream
from mpidp.errors import DataError, UsageError
from tests.unit.test_convert import documents_of

EOD = 256  # of the byte tokenizer
MASKED = [name for name, one in FORMATS.items() if one.masks]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("formats")
    (place / "texts").mkdir()
    for i in range(30):
        (place / f"texts/{i:02d}.txt").write_text(f"text {i} " * (i * i % 17 + 1))
    prepare(str(place / "texts"), "byte", place / "shards", shards=3, val_fraction=0.3, split="document", verbose=False)
    return place / "shards"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed rows with a loss mask."""
    place = tmp_path_factory.mktemp("rows")
    lines = [json.dumps({"prompt": f"{i} + {i} =" + " " * (i % 5), "completion": f" {2 * i}." * (i % 4 + 1)}) for i in range(60)]
    (place / "rows.jsonl").write_text("\n".join(lines))
    prepare(str(place / "rows.jsonl"), "byte", place / "shards", shards=2, val_fraction=0.3, form="prompt_completion", seq_len=48,
            verbose=False)
    return place / "shards"


def take(name: str, source: Path, out: Path, **options: object) -> list[str]:
    given = {"shards": 2, "val_fraction": 0.0} | options
    return from_tokens(name, source, out, FromOptions("byte", **given))  # type: ignore[arg-type]


def with_masks(path: Path, split: str) -> list[list[tuple[int, bool]]]:
    """The documents of a split, each as pairs (id, whether it is in the loss), without the tokens that fill windows."""
    stream, found = TokenStream(path, split), []
    mask = stream.read_mask(0, stream.num_tokens)
    assert mask is not None
    at = 0
    for ids in documents_of(path, split):
        pairs = [(i, bool(m)) for i, m in zip(ids, mask[at : at + len(ids)], strict=True)]
        at += len(ids)
        while len(pairs) > 1 and pairs[-1] == (EOD, False) and pairs[-2][0] == EOD:
            pairs.pop()
        found.append(pairs)
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_and_documents_come_back(name: str, shards: Path, tmp_path: Path) -> None:
    said = to_tokens(name, shards, tmp_path / "there/it")
    assert len(said) == 2 and f"{TokenStream(shards).num_tokens:,} tokens" in said[0]
    source = tmp_path / "there/it"
    assert recognized(source) == name
    take("auto", source, tmp_path / "back")
    for split in ("train", "val"):
        assert documents_of(tmp_path / "back", split) == documents_of(shards, split)
        TokenStream(tmp_path / "back", split).check(contents=True)
    back, first = TokenStream(tmp_path / "back").index, TokenStream(shards).index
    assert back.tokenizer_sha256 == first.tokenizer_sha256 and back.special_tokens_sha256 == first.special_tokens_sha256
    assert {k: s.text_bytes for k, s in back.splits.items()} == {k: s.text_bytes for k, s in first.splits.items()}
    assert back.source["kind"] == name and not back.splits["train"].loss_mask
    to_tokens(name, tmp_path / "back", tmp_path / "again/it")
    there, again = (
        {str(path.relative_to(tmp_path / one)): path.read_bytes() for path in (tmp_path / one).rglob("*.*") if path.is_file()}
        for one in ("there", "again"))
    assert there == again and len(there) >= 2
    with pytest.raises(UsageError, match="exists and is not overwritten"):
        to_tokens(name, shards, tmp_path / "there/it")
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith("tmp") or path.is_dir()]


@pytest.mark.parametrize("name", MASKED)
def test_loss_masks_come_back(name: str, rows: Path, tmp_path: Path) -> None:
    to_tokens(name, rows, tmp_path / "it")
    take(name, tmp_path / "it", tmp_path / "back", seq_len=48)
    take(name, tmp_path / "it", tmp_path / "loose")
    for split in ("train", "val"):
        wanted = sorted(with_masks(rows, split))
        assert sorted(with_masks(tmp_path / "back", split)) == wanted == sorted(with_masks(tmp_path / "loose", split))
    assert TokenStream(tmp_path / "back").index.window == 48 and not TokenStream(tmp_path / "loose").index.window
    with pytest.raises(DataError, match=r"more than --seq-len 12 tokens \(up to"):
        take(name, tmp_path / "it", tmp_path / "short", seq_len=12)


def test_a_truncated_row_that_fills_the_last_window_keeps_its_length(tmp_path: Path) -> None:
    """The token after the last window belongs to no row."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "long", "completion": "abcdefgh"}))
    prepare(str(tmp_path / "a.jsonl"), "byte", tmp_path / "shards", 1, 0.0, form="prompt_completion", seq_len=8, truncate=True,
            verbose=False)
    to_tokens("datatrove", tmp_path / "shards", tmp_path / "it")
    take("datatrove", tmp_path / "it", tmp_path / "back", seq_len=8)
    take("datatrove", tmp_path / "it", tmp_path / "loose")
    assert ids_of(tmp_path / "back") == ids_of(tmp_path / "shards") == [*b"longabcd", EOD]
    assert ids_of(tmp_path / "loose") == [*b"longabcd"]


@pytest.mark.parametrize("name", ["litdata", "mds"])
def test_rows_in_several_files_come_back(
    name: str, shards: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "FILE_BYTES", 900)
    to_tokens(name, shards, tmp_path / "it")
    assert len([path for path in (tmp_path / "it/train").iterdir() if path.name != "index.json"]) > 3
    take("auto", tmp_path / "it", tmp_path / "back")
    assert all(documents_of(tmp_path / "back", split) == documents_of(shards, split) for split in ("train", "val"))
    monkeypatch.setattr(row_files, "MAX_BYTES", 200)
    with pytest.raises(UsageError, match="a document has .* tokens, but a file of this format must have less than 4 GiB"):
        to_tokens(name, shards, tmp_path / "long")
    monkeypatch.setattr(row_files.RowFiles, "close", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match="No space left"):
        to_tokens(name, shards, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "it"]


@pytest.mark.parametrize(("name", "stored"), [("litdata", "no_header_tensor:16"), ("mds", "ndarray:uint32")])
def test_wide_ids_keep_their_type(name: str, stored: str, tmp_path: Path) -> None:
    words = {f"w{i}": i for i in range(70_000)} | {"<|endoftext|>": 70_000}
    encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    encoder.add_special_tokens(["<|endoftext|>"])
    encoder.save(str(tmp_path / "tokenizer.json"))
    ids = [69_999, 2, 70_000, 3, 70_000]
    np.array(ids, "<u4").tofile(tmp_path / "train.bin")
    options = FromOptions(str(tmp_path / "tokenizer.json"), 1, 0.0, dtype="uint32")
    from_tokens("nanogpt", tmp_path / "train.bin", tmp_path / "shards", options)
    to_tokens(name, tmp_path / "shards", tmp_path / "it")
    assert stored in (tmp_path / "it/train/index.json").read_text()
    from_tokens(name, tmp_path / "it", tmp_path / "back", options)
    assert documents_of(tmp_path / "back", "train") == [ids[:3], ids[3:]]


@pytest.mark.parametrize("name", sorted(set(FORMATS) - set(MASKED)))
def test_a_format_without_masks_refuses_them(name: str, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="loss mask, which .* cannot store.* datatrove, mds, litdata, hf, olmo"):
        to_tokens(name, rows, tmp_path / "it")
    assert not list(tmp_path.iterdir())


def ids_of(out: Path) -> list[int]:
    return [i for document in documents_of(out, "train") for i in document]


STREAM = [1, 2, EOD, 3, 4, 5, EOD, 6, EOD]


def test_nanogpt(tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.mkdir()
    np.array(STREAM, "<u2").tofile(source / "train.bin")
    np.array([7, EOD, 8, EOD], "<u2").tofile(source / "val.bin")
    (source / "meta.pkl").write_bytes(b"\x80\x04\x95never read")
    take("nanogpt", source, tmp_path / "out")
    assert documents_of(tmp_path / "out", "train") == [[1, 2, EOD], [3, 4, 5, EOD], [6, EOD]]
    assert documents_of(tmp_path / "out", "val") == [[7, EOD], [8, EOD]]


@pytest.mark.parametrize(("dtype", "wider"), [("<u4", "uint32"), ("<i8", "uint64")])
def test_ids_of_a_wider_type_are_not_read_as_uint16(tmp_path: Path, dtype: str, wider: str) -> None:
    np.array(STREAM * 4, dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=f"every second uint16 is 0.*--dtype {wider}"):
        take("nanogpt", tmp_path / "train.bin", tmp_path / "out")
    take("nanogpt", tmp_path / "train.bin", tmp_path / "out", dtype=wider)
    assert ids_of(tmp_path / "out") == STREAM * 4


@pytest.mark.parametrize(("first", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_llmc(tmp_path: Path, first: int, version: int, dtype: str) -> None:
    """Its end-of-document token begins documents; documents continue in the next file, and the first file may begin inside
    one."""
    def file(name: str, ids: list[int], tokens: int | None = None, begin: tuple[int, int] = (first, version)) -> Path:
        header = np.zeros(256, "<i4")
        header[:3] = *begin, len(ids) if tokens is None else tokens
        (tmp_path / name).write_bytes(header.tobytes() + np.array(ids, dtype).tobytes())
        return tmp_path / name

    file("x_val_000000.bin", [EOD, 1, 2])
    file("x_train_000001.bin", [3, EOD, 4, 5])
    file("x_train_000002.bin", [6, EOD, 7])
    said = take("auto", tmp_path, tmp_path / "out")
    assert said[-1] == f"documents begin with the token id {EOD}. If documents end with this token, give --eod-at end"
    assert documents_of(tmp_path / "out", "train") == [[3], [EOD, 4, 5, 6], [EOD, 7]]
    assert documents_of(tmp_path / "out", "val") == [[EOD, 1, 2]]
    assert "The model does not learn this token" in take("llmc", tmp_path, tmp_path / "packed", seq_len=4)[-1]
    take("llmc", tmp_path, tmp_path / "other", eod_at="end")
    assert documents_of(tmp_path / "other", "train") == [[3, EOD], [4, 5, 6, EOD], [7]]
    wrong = [("states 9 tokens", [1, 2], 9, (first, version)), ("version 5", [1], 1, (first, 5)),
             ("multiple-choice", [1], 1, (20240522, 1)), ("use --from nanogpt", [1], 1, (77, 1))]
    for why, ids, tokens, begin in wrong:
        path = file("a.bin", ids, tokens, begin)
        with pytest.raises(DataError, match=why):
            take("llmc", path, tmp_path / "new")


def test_olmo_without_and_with_a_table_of_documents(tmp_path: Path) -> None:
    for i in range(2):
        np.array(STREAM, "<u2").tofile(tmp_path / f"part-{i}.npy")
    with gzip.open(tmp_path / "part-1.csv.gz", "wt") as table:
        table.write("0,3,id,x\n3,3,id,x\n3,9,id,x\n")
    take("olmo", tmp_path, tmp_path / "out")
    ends = [[1, 2, EOD], [3, 4, 5, EOD], [6, EOD]]
    assert documents_of(tmp_path / "out", "train") == [*ends, ends[0], ends[1] + ends[2]]
    for table_of, why in (("0,3\n4,9\n", "must begin at"), ("0,300\n", "must begin at"), ("a,b\n", "cannot be read as lines")):
        (tmp_path / "part-1.csv.gz").write_bytes(gzip.compress(table_of.encode()))
        with pytest.raises(DataError, match=why):
            take("olmo", tmp_path, tmp_path / "new")


def test_arrays_of_numpy_save(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array(STREAM, ">i4"))
    take("auto", tmp_path / "ids.npy", tmp_path / "out")
    assert ids_of(tmp_path / "out") == STREAM
    wrong = [(np.array(["a"], object), "pickled objects"), (np.zeros((2, 2), "i4"), "one dimension"), (np.zeros(4), "float64")]
    for array, why in wrong:
        np.save(tmp_path / "ids.npy", array, allow_pickle=True)
        with pytest.raises(DataError, match=why):
            take("olmo", tmp_path / "ids.npy", tmp_path / "new")


def test_datatrove(tmp_path: Path) -> None:
    def files(ends: list[int], about: str | None = "x|2\n9\n9 T", loss: bytes | None = None) -> None:
        np.array(STREAM, "<u2").tofile(tmp_path / "0.ds")
        np.array(ends, "<u8").tofile(tmp_path / "0.ds.index")
        for end, content in ((".metadata", about and about.encode()), (".loss", loss)):
            (tmp_path / f"0.ds{end}").unlink(missing_ok=True)
            if content is not None:
                (tmp_path / f"0.ds{end}").write_bytes(content)

    files([2, 2, 9], loss=bytes([0, 1] * 4 + [1]))
    said = take("auto", tmp_path, tmp_path / "out")
    assert said[1:] == ["1 document without tokens was skipped", f"1 of 2 documents does not end with the end-of-document "
                                                                 f"token, id {EOD}"] or said
    assert documents_of(tmp_path / "out", "train") == [[1, 2], STREAM[2:]]
    mask = TokenStream(tmp_path / "out").read_mask(0, 9)
    assert mask is not None and mask.tolist() == [bool(i) for i in [0, 1] * 4 + [1]]
    wrong = [({"ends": [2, 8]}, "must end at 9, the number of tokens in .* ends at 8"),
             ({"ends": [5, 2, 9]}, "must not be negative or decrease"),
             ({"ends": [9], "about": "x|4\n9\n9 T"}, "states 9 tokens of 4 bytes each"),
             ({"ends": [9], "about": "x"}, "states an unknown number"),
             ({"ends": [9], "loss": b"\1"}, "has 1 bytes, and .* has 9 tokens")]
    for changes, why in wrong:
        files(**changes)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=why):
            take("datatrove", tmp_path, tmp_path / "new")
    (tmp_path / "0.ds.index").unlink()
    with pytest.raises(DataError, match="0.ds.index is missing"):
        take("datatrove", tmp_path, tmp_path / "new")


def parquet(path: Path, **columns: object) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_rows_with_labels_and_padding(tmp_path: Path) -> None:
    source = parquet(tmp_path / "a.parquet", input_ids=[[1, 2, 3, EOD], [4, 5, 0, 0], [], [6]],
                     labels=[[-100, 2, 3, EOD], [-100, 5, -100, -100], [], [6]], attention_mask=[[1] * 4, [1, 1, 0, 0], [], [1]])
    said = take("hf", source, tmp_path / "out")
    assert said[1:-1] == [
        "2 of 3 documents do not end with the end-of-document token, id 256", "1 document without tokens was skipped"]
    assert documents_of(tmp_path / "out", "train") == [[1, 2, 3, EOD], [4, 5], [6]]
    mask = TokenStream(tmp_path / "out").read_mask(0, 7)
    assert mask is not None and mask.tolist() == [False, True, True, True, False, True, True]
    take("hf", source, tmp_path / "ended", add_eod=True)
    assert documents_of(tmp_path / "ended", "train") == [[1, 2, 3, EOD], [4, 5, EOD], [6, EOD]]
    take("hf", source, tmp_path / "packed", seq_len=8, val_fraction=0.2)
    assert with_masks(tmp_path / "packed", "val")[0][:1] == [(6, True)]


def test_labels_that_leave_out_nothing_are_no_mask(tmp_path: Path) -> None:
    ids = [[1, EOD], [2, 3, EOD]]
    take("hf", parquet(tmp_path / "a.parquet", input_ids=ids, labels=ids), tmp_path / "out")
    assert not TokenStream(tmp_path / "out").has_loss_mask


def test_rows_of_one_length_are_joined(tmp_path: Path) -> None:
    ids = [STREAM[0:3], STREAM[3:6], STREAM[6:9]]
    source = parquet(tmp_path / "a.parquet", input_ids=ids, labels=ids)
    said = take("hf", source, tmp_path / "out")
    assert said[1] == ("rows of 3 tokens were joined, and documents end with the token id 256. If each row is a document, "
                       "give --rows document")
    assert documents_of(tmp_path / "out", "train") == [[1, 2, EOD], [3, 4, 5, EOD], [6, EOD]]
    take("hf", source, tmp_path / "rows", rows="document")
    assert documents_of(tmp_path / "rows", "train") == [STREAM[0:3], STREAM[3:6], STREAM[6:9]]


PACKED = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 0]]


@pytest.mark.parametrize("columns", [
    {"position_ids": [[0, 1, 0, 1, 2], [0, 1], [0, 0, 1, 2]]}, {"attention_mask": [[1, 1, 2, 2, 2], [1, 1], [1, 2, 2, 0]]},
    {"seq_lengths": [[2, 3], [2], [1, 3]]},
    {"seq_lengths": [[2, 3], [2], [1, 3]], "attention_mask": [[1] * 5, [1] * 2, [1, 1, 1, 0]]},
    {"cu_seqlens": [[0, 2, 5], [0, 2], [0, 1, 4]]}, {"cu_seq_lens_q": [[0, 2, 2, 5], [0, 2], [0, 1, 4]]},
    {"segment_ids": [[0, 0, 1, 1, 1], [0, 0], [0, 1, 1, 1]]}, {"segment_ids": [[1, 1, 2, 2, 2], [1, 1], [1, 2, 2, 0]]},
    {"seq_idx": [[7, 7, 3, 3, 3], [3, 3], [0, 1, 1, -1]]},
    {"segment_ids": [[0, 0, 1, 1, 1], [0, 0], [0, 1, 1, 1]], "attention_mask": [[1] * 5, [1] * 2, [1, 1, 1, 0]]},
    {"document_ids": [["a"], ["b"], ["c"]], "segment_ids": [[0, 0, 1, 1, 1], [0, 0], [0, 1, 1, 1]], "doc": [1, 2, 3]},
])
def test_documents_of_packed_rows_stay_apart(tmp_path: Path, columns: dict[str, object]) -> None:
    source = parquet(tmp_path / "a.parquet", input_ids=PACKED, **columns)
    take("hf", source, tmp_path / "out")
    is_padding = "attention_mask" in columns or str(columns).endswith(("2, 0]]}", "-1]]}"))
    last = [9, 10] if is_padding else [9, 10, 0]
    assert documents_of(tmp_path / "out", "train") == [[1, 2], [3, 4, 5], [6, 7], [8], last]


def test_packed_rows_whose_documents_have_one_length_are_not_joined(tmp_path: Path) -> None:
    source = parquet(tmp_path / "a.parquet", input_ids=[[1, 2, 3, EOD]] * 2, segment_ids=[[0, 0, 1, 1]] * 2)
    take("hf", source, tmp_path / "out")
    assert documents_of(tmp_path / "out", "train") == [[1, 2], [3, EOD]] * 2


@pytest.mark.parametrize(("name", "values"), [
    ("cu_seqlens", [0, 2, 5]), ("seq_lengths", [2, 3]), ("segment_ids", [1, 1, 2, 2, 2]), ("position_ids", [0, 1, 0, 1, 2])])
def test_packed_rows_of_mds_keep_their_documents(name: str, values: list[int], tmp_path: Path) -> None:
    def array(numbers: list[int]) -> bytes:
        return bytes([1 << 2, len(numbers)]) + np.array(numbers, "<u2").tobytes()

    source = mds(tmp_path / "a", {"tokens": "ndarray:uint16", name: "ndarray:uint16"},
                 [{"tokens": array(PACKED[0]), name: array(values)}] * 2)
    take("mds", source, tmp_path / "out")
    assert documents_of(tmp_path / "out", "train") == [[1, 2], [3, 4, 5]] * 2
    pickled = mds(tmp_path / "b", {"tokens": "ndarray:uint16", "segment_ids": "pkl"},
                  [{"tokens": array(PACKED[0]), "segment_ids": b"x"}])
    with pytest.raises(DataError, match="`segment_ids` holds pickles"):
        take("mds", pickled, tmp_path / "new")


@pytest.mark.parametrize("kind", ["float", "double"])
def test_masks_of_floats_are_read(kind: str, tmp_path: Path) -> None:
    import pyarrow

    def floats(values: list[float]) -> object:
        return pyarrow.array([values], pyarrow.list_(getattr(pyarrow, f"{kind}32" if kind == "float" else "float64")()))

    take("hf", parquet(tmp_path / "a.parquet", input_ids=[[1, 2, EOD, 9]], loss_mask=floats([0.0, 1.0, 1.0, 1.0]),
                       attention_mask=floats([1.0, 1.0, 1.0, 0.0])), tmp_path / "out")
    mask = TokenStream(tmp_path / "out").read_mask(0, 3)
    assert mask is not None and mask.tolist() == [False, True, True] and ids_of(tmp_path / "out") == [1, 2, EOD]
    for wrong in (0.5, float("nan"), -1.0):
        with pytest.raises(DataError, match=r"`loss_mask` has the value .*must have only the values 0 and 1"):
            take("hf", parquet(tmp_path / "a.parquet", input_ids=[[1]], loss_mask=floats([wrong])), tmp_path / "new")


def test_a_token_that_ends_and_begins_documents_is_told(tmp_path: Path) -> None:
    np.array([EOD, 1, EOD, EOD, 2, EOD], "<u2").tofile(tmp_path / "train.bin")
    assert "2 of 4 documents contain only the end-of-document token, id 256" in "".join(take("auto", tmp_path, tmp_path / "out"))


def test_a_folder_with_files_of_several_kinds_is_refused(tmp_path: Path) -> None:
    np.array(STREAM, "<u2").tofile(tmp_path / "train.bin")
    np.save(tmp_path / "other.npy", np.array(STREAM))
    with pytest.raises(DataError, match="several kinds, .bin, .npy. Name the kind to read, for example --from olmo"):
        take("auto", tmp_path, tmp_path / "out")
    (tmp_path / "other.npy").rename(tmp_path / ".hidden.npy")
    take("auto", tmp_path, tmp_path / "out")
    assert ids_of(tmp_path / "out") == STREAM


@pytest.mark.parametrize(("columns", "why"), [
    ({"input_ids": [[1, 2]], "seq_lengths": [[1]]}, "`seq_lengths` in row 0 do not add up to 2, the number of tokens"),
    ({"input_ids": [[1], [1, 2]], "cu_seqlens": [[0, 1], [0, 1]]}, "`cu_seqlens` in row 1 do not rise from 0 to 2, the number"),
    ({"input_ids": [[1, 2]], "cu_seqlens": [[1, 2]]}, "`cu_seqlens` in row 0"),
    ({"input_ids": [[1]], "cu_seqlens": [[]]}, "`cu_seqlens` holds lists of null"),
    ({"input_ids": [[1, 2]], "cu_seqlens": [[0, 3, 1, 2]]}, "`cu_seqlens` in row 0"),
    ({"input_ids": [[1, 2]], "cu_seqlens": [[[0, 1, 2]]]}, "`cu_seqlens` holds"),
    ({"input_ids": [[1, 2]], "segment_ids": [[1.0, 2.0]]}, "`segment_ids` holds float64"),
    ({"input_ids": [[1, 2]], "inputs_segmentation": [[1, 2]]}, "`inputs_segmentation` may show where the documents of packed"),
    ({"input_ids": [[1, 2]], "segment_ids": [[1]]}, "one value per token"),
    ({"input_ids": [[1, 2], [1, 2]], "position_ids": [[0, 1], [0, 2]]}, "row 1 has the position 2 after 0"),
    ({"text": ["a"]}, r"no column of token ids \(input_ids\), only text"), ({"input_ids": ["a b"]}, "not a list of integers"),
    ({"input_ids": [[1.0]]}, "`input_ids` holds float64"), ({"input_ids": [[1, None]]}, "null among the values"),
    ({"input_ids": [[1, 2]], "labels": [[2, 3]]}, "row 0 has the label 2 for the id 1"),
    ({"input_ids": [[1, 2]], "labels": [[1]]}, "one value per token"),
    ({"input_ids": [[1, 300]]}, "token 1 has the id 300"), ({"input_ids": [[1, -1]]}, "token 1 has the id -1"),
])
def test_rows_that_are_no_tokens_are_refused(tmp_path: Path, columns: dict[str, object], why: str) -> None:
    with pytest.raises(DataError, match=why):
        take("hf", parquet(tmp_path / "a.parquet", **columns), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def mds(
    folder: Path, encodings: dict[str, str], samples: list[dict[str, bytes]], fixed: dict[str, int] | None = None,
    packed: str = "",
) -> Path:
    """Write a folder of MDS as its documentation says."""
    folder.mkdir()
    names = sorted(encodings)
    sizes = [(fixed or {}).get(name) for name in names]
    made = [b"".join(np.uint32(len(one[name])).tobytes() for name, size in zip(names, sizes, strict=True) if size is None)
            + b"".join(one[name] for name in names) for one in samples]
    about = b"{}"
    begin = 4 + 4 * (len(made) + 1) + len(about)
    offsets = np.cumsum([begin, *map(len, made)]).astype("<u4")
    data = np.uint32(len(made)).tobytes() + offsets.tobytes() + about + b"".join(made)
    name, zipped = "shard.00000.mds", None
    if packed:
        zipped = {"basename": f"{name}.{packed}", "bytes": 0, "hashes": {}}
        (folder / f"{name}.{packed}").write_bytes(gzip.compress(data) if packed == "gz" else data)
    else:
        (folder / name).write_bytes(data)
    shard = {
        "column_names": names, "column_encodings": [encodings[n] for n in names], "column_sizes": sizes, "format": "mds",
        "hashes": [], "compression": packed or None, "samples": len(made),
        "raw_data": {"basename": name, "bytes": len(data), "hashes": {}},
        "size_limit": 1 << 26, "version": 2, "zip_data": zipped}
    (folder / "index.json").write_text(json.dumps({"shards": [shard], "version": 2}))
    return folder


def test_mds(tmp_path: Path) -> None:
    rows = [[1, 2, EOD], [3, EOD]]
    as_bytes = mds(tmp_path / "a", {"tokens": "bytes", "text": "str"},
                   [{"tokens": np.array(row, "<i8").tobytes(), "text": b"x"} for row in rows], packed="gz")
    arrays = mds(tmp_path / "b", {"tokens": "ndarray"},
                 [{"tokens": bytes([33, 1 << 2, len(row)]) + np.array(row, "<i4").tobytes()} for row in rows])
    typed = mds(tmp_path / "c", {"tokens": "ndarray:uint16", "loss_mask": "ndarray:uint8"},
                [{"tokens": bytes([1 << 2, len(row)]) + np.array(row, "<u2").tobytes(),
                  "loss_mask": bytes([1 << 2, len(row)]) + bytes(i % 2 for i in range(len(row)))} for row in rows])
    shaped = mds(tmp_path / "d", {"tokens": "ndarray:int32:2"},
                 [{"tokens": np.array([i, EOD], "<i4").tobytes()} for i in (1, 2)], {"tokens": 8})
    for source in (as_bytes, arrays, typed):
        take("auto", source, tmp_path / f"of_{source.name}")
        assert documents_of(tmp_path / f"of_{source.name}", "train") == rows
    mask = TokenStream(tmp_path / "of_c").read_mask(0, 5)
    assert mask is not None and mask.tolist() == [False, True, False, False, True]
    take("mds", shaped, tmp_path / "of_d")
    assert documents_of(tmp_path / "of_d", "train") == [[1, EOD], [2, EOD]]


def test_mds_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    one = {"tokens": np.array([1, 2, 3, 4], "<u2").tobytes()}
    wrong = [
        (mds(tmp_path / "a", {"tokens": "pkl"}, [one]), "holds pickles, which are never read"),
        (mds(tmp_path / "b", {"tokens": "bytes"}, [one] * 2), "bytes that are not int64 ids. Give the type .*--dtype"),
        (mds(tmp_path / "c", {"tokens": "bytes"}, [one], packed="snappy"), "compressed with 'snappy', which mpidp cannot read"),
        (mds(tmp_path / "d", {"tokens": "str"}, [one]), "ids must be ndarray or bytes"),
        (mds(tmp_path / "e", {"tokens": "ndarray"}, [{"tokens": b"\x21\x04\x09\0\0\0\0"}]), "has 1 values, but the shape"),
        (mds(tmp_path / "f", {"text": "str"}, [{"text": b"x"}]), "no column of token ids"),
    ]
    outside = mds(tmp_path / "g", {"tokens": "bytes"}, [one])
    (outside / "index.json").write_text((outside / "index.json").read_text().replace("shard.00000", "../a/shard.00000"))
    cut = mds(tmp_path / "h", {"tokens": "bytes"}, [one])
    (cut / "shard.00000.mds").write_bytes((cut / "shard.00000.mds").read_bytes()[:-3])
    gone = mds(tmp_path / "i", {"tokens": "bytes"}, [one])
    (gone / "shard.00000.mds").unlink()
    for source, why in [*wrong, (outside, "not a plain path below"), (cut, "lie outside the file"), (gone, "cannot be read")]:
        with pytest.raises(DataError, match=why):
            take("mds", source, tmp_path / "out")
    take("mds", tmp_path / "b", tmp_path / "typed", dtype="uint16", rows="document")
    assert documents_of(tmp_path / "typed", "train") == [[1, 2, 3, 4]] * 2


@pytest.mark.parametrize("options", [{"rows": "document"}, {"add_eod": True}, {"column": "ids"}])
def test_options_of_rows_are_refused_for_formats_without_rows(options: dict[str, object], shards: Path, tmp_path: Path) -> None:
    to_tokens("megatron", shards, tmp_path / "it")
    with pytest.raises(UsageError, match="have no rows, so --(rows|add-eod|column) cannot be given. .* mds, litdata, hf"):
        take("megatron", tmp_path / "it", tmp_path / "out", **options)


def test_a_folder_of_another_format_is_named(tmp_path: Path, shards: Path) -> None:
    np.array(STREAM, "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match="looks like nanoGPT's .bin: use --from nanogpt"):
        take("datatrove", tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="looks like Hugging Face's .*: use --from hf"):
        take("nanogpt", parquet(tmp_path / "a.parquet", input_ids=[[1]]), tmp_path / "out")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("a")
    with pytest.raises(DataError, match="holds no tokens in a format that convert knows. The formats are megatron, "):
        take("auto", tmp_path / "text", tmp_path / "out")
    with pytest.raises(DataError, match="does not exist"):
        take("auto", tmp_path / "none", tmp_path / "out")
    with pytest.raises(UsageError, match="is a folder of shards; .* give --to FORMAT"):
        take("auto", shards, tmp_path / "out")


def test_data_without_ends_of_documents_are_refused(tmp_path: Path) -> None:
    np.arange(9, dtype="<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match="id 256, is not in the data, so the ends of documents are unknown. Give --eod TOKEN"):
        take("nanogpt", tmp_path / "train.bin", tmp_path / "out")
    take("nanogpt", tmp_path / "train.bin", tmp_path / "out", whole=True)
    assert documents_of(tmp_path / "out", "train") == [list(range(9))]
    (tmp_path / "train.bin").write_bytes(bytes(7))
    with pytest.raises(DataError, match="7 bytes of tokens are not a multiple of 2"):
        take("nanogpt", tmp_path / "train.bin", tmp_path / "new")
    for head, why in ((b"PAR1", "parquet"), (b"\x80\x04\x95", "never read"), (b"\x1f\x8b", "gzip")):
        (tmp_path / "train.bin").write_bytes(head + bytes(61))
        with pytest.raises(DataError, match=why):
            take("nanogpt", tmp_path / "train.bin", tmp_path / "new")


def test_a_split_for_tests_is_left_out(tmp_path: Path) -> None:
    for name, i in (("train-0", 1), ("validation-0", 2), ("test-0", 3)):
        parquet(tmp_path / f"{name}.parquet", input_ids=[[i, EOD]])
    said = take("hf", tmp_path, tmp_path / "out")
    assert said[2].startswith("1 of 3 files or folders belong to a test split and were left out")
    assert ids_of(tmp_path / "out") == [1, EOD] and documents_of(tmp_path / "out", "val") == [[2, EOD]]


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "train").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    parquet(source / "train/a.parquet", input_ids=[[1, EOD]])
    parquet(tmp_path / "far/b.parquet", input_ids=[[2, EOD]])
    for name, target in (("more", tmp_path / "far"), ("again", source / "train"), ("up", tmp_path)):
        (source / name).symlink_to(target)
    take("auto", source, tmp_path / "out")
    assert ids_of(tmp_path / "out") == [2, EOD, 1, EOD]


def test_what_headerless_files_cannot_store_is_said(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", input_ids=[[1, 2], [3, EOD, 4, EOD], [5, EOD]])
    take("hf", tmp_path, tmp_path / "shards")
    assert to_tokens("nanogpt", tmp_path / "shards", tmp_path / "out")[-1].startswith("nanoGPT's .bin does not store where "
                                                                                      "documents end. At 2 places")


def test_parts_that_repeat_others_are_left_out(tmp_path: Path) -> None:
    for name in ("train", "train_small", "val", "val_xsmall"):
        mds(tmp_path / name, {"tokens": "bytes"}, [{"tokens": np.array([len(name), EOD], "<i8").tobytes()}])
    said = take("mds", tmp_path, tmp_path / "out")
    assert said[2] == "train_small, val_xsmall: left out, because other folders contain the same samples"
    assert ids_of(tmp_path / "out") == [5, EOD] and documents_of(tmp_path / "out", "val") == [[3, EOD]]
    parquet(tmp_path / "p.parquet", input_ids=[[1, EOD]])
    (tmp_path / "cache-1.parquet").write_bytes(b"left by datasets")
    take("hf", tmp_path, tmp_path / "new")
    assert ids_of(tmp_path / "new") == [1, EOD]


@pytest.mark.parametrize("name", ["0.ds", "0.ds.index", "0.ds.loss", "0.ds.metadata"])
def test_special_files_are_refused_without_waiting(tmp_path: Path, name: str) -> None:
    np.array(STREAM, "<u2").tofile(tmp_path / "0.ds")
    np.array([9], "<u8").tofile(tmp_path / "0.ds.index")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=name.replace(".", "[.]")):
        take("datatrove", tmp_path / "0.ds", tmp_path / "out")


def test_memory_does_not_grow_with_a_parquet_row_group(tmp_path: Path) -> None:
    """One row group whose columns have 64 MB each, as other programs write, is read by convert and by prepare in parts.

    Code that holds a whole column needs 94 MB. In parts, 36 MB are usual, and 45 MB were seen on a busy machine. Both include
    pyarrow's own code."""
    import pyarrow
    import pyarrow.parquet

    ids = np.tile(np.arange(1000, dtype=np.int32) % 257, 16_000)
    rows = pyarrow.ListArray.from_arrays(np.arange(0, len(ids) + 1, 1000, dtype=np.int32), pyarrow.array(ids))
    table = pyarrow.table({"input_ids": rows, "text": ["0123456789" * 400] * len(rows)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=len(rows), use_dictionary=False, compression=None)
    code = (
        "import re, sys, pyarrow.parquet, pyarrow.compute\n"
        "from pathlib import Path\n"
        "from data_tools.formats import hf\n"
        "from data_tools.formats.blocks import ReadOptions\n"
        "from mpidp.data.records import records\n"
        "from mpidp.data.text_files import recognize\n"
        "path = Path(sys.argv[1])\n"
        "def peak():\n"
        "    return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) // 1024\n"
        "def grown(blocks):\n"
        "    before = peak()\n"
        "    count = sum(1 for _ in blocks)\n"
        "    return peak() - before\n"
        "print(grown(hf.read(path, ReadOptions(257, path.parent))), grown(iter(records(recognize(path), ['text']))))\n"
    )
    child = subprocess.run([sys.executable, "-c", code, tmp_path / "a.parquet"], capture_output=True, text=True, check=True)
    assert all(int(megabytes) < 64 for megabytes in child.stdout.split()), child.stdout
